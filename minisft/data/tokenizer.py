"""A `tokenizer.json`, used so that text stays text.

Special tokens steer a chat model, so only the template may produce them. Content is encoded with special tokens
switched off: a user who types `<|eot_id|>` gets the seven ordinary tokens that spell it. The switch is not saved in
the file and is off after loading, hence this wrapper; it also leaves the beginning-of-text token, which the file's
post-processor would add by itself, to the template, so that there is exactly one.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from minisft.errors import UserError, printable
from minisft.files import from_hub, read_small, regular_file

LARGEST = 2**28  # bytes; Llama-3's has 17 MB
FOLDER = "model.tokenizer, or else model.path, is a folder with a tokenizer.json"


class TokenizerError(UserError):
    """The library fails on a text, as its regular expressions do on a run of ten million blanks."""


class Tokenizer:
    """The tokenizer in `path`, a model folder or a `tokenizer.json`; `option` names it on the command line. Raises
    UserError if it cannot be read."""

    def __init__(self, path: str | Path, *, option: str = "--model.path"):
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: no such folder; {FOLDER}, of a model that was downloaded or trained "
                            f"(`minisft train` makes the demo's){from_hub(path, option)}")
        self.file = path / "tokenizer.json" if path.is_dir() else path
        try:
            if self.file.exists() and regular_file(self.file).st_size > LARGEST:
                raise UserError(f"{self.file}: not a tokenizer.json; {_remedy(path)}")
            self.content = self.file.read_bytes()
            self._backend = tokenizers.Tokenizer.from_buffer(self.content)
            if getattr(self._backend.model, "dropout", None):  # of merges, drawn anew at every call
                content = json.loads(self.content)
                content["model"]["dropout"] = None
                self.content = json.dumps(content, ensure_ascii=False).encode()
                self._backend = tokenizers.Tokenizer.from_buffer(self.content)
        except (UserError, KeyboardInterrupt):
            raise
        except OSError as error:
            raise UserError(f"{self.file}: {error.strerror}; {_remedy(path)}") from None
        except BaseException as error:  # the library raises a bare Exception, or panics with less than that
            raise UserError(f"{self.file}: not a tokenizer.json ({printable(error, 200)}); {_remedy(path)}") from None
        if not self._backend.get_vocab_size(with_added_tokens=False):
            raise UserError(f"{self.file}: its vocabulary is empty; download the model again")
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self._backend.encode_special_tokens = True
        self._backend.no_padding()
        self._backend.no_truncation()
        added = self._backend.get_added_tokens_decoder()
        self.control = {token.content: index for index, token in added.items() if token.special}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        self.largest_of_text = max((vocabulary[text] for text in vocabulary.keys() - self.control.keys()), default=-1)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """`tokenizer_config.json` beside it; empty if there is none."""
        file = self.file.with_name("tokenizer_config.json")
        try:
            settings = json.loads(read_small(file)) if file.exists() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: not readable JSON ({error})") from None
        if not isinstance(settings, dict):
            raise UserError(f"{file}: expected a JSON object, found {type(settings).__name__}")
        return settings

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja text that comes with the tokenizer, to be recognised, never executed; of several the default."""
        file = self.file.with_name("chat_template.jinja")
        if file.exists():
            return read_small(file, errors="replace")
        jinja = self.settings.get("chat_template")
        if isinstance(jinja, list):  # [{"name": "default", "template": ...}, ...]
            named = {str(one.get("name")): one.get("template") for one in jinja if isinstance(one, dict)}
            jinja = named.get("default")
        return jinja if isinstance(jinja, str) else None

    @cached_property
    def bos_token(self) -> str:
        """`bos_token` of tokenizer_config.json, which a chat template may begin with; empty if there is none."""
        bos = self._named("bos_token")
        return bos if bos in self.control else ""

    @cached_property
    def bos(self) -> str:
        """The special token that this tokenizer's own post-processor puts before a text, or nothing."""
        ids = self._backend.encode("a", add_special_tokens=True).ids
        return (self._backend.id_to_token(ids[0]) or "") if ids[:1] != self.encode("a")[:1] else ""

    @cached_property
    def eos(self) -> str:
        """`eos_token` of tokenizer_config.json."""
        eos = self._named("eos_token")
        if eos is None or eos not in self.control:
            raise UserError(f"{self.file.with_name('tokenizer_config.json')}: eos_token is {printable(repr(eos))}; the "
                            f"template ends a text with it, and it must be a special token of {self.file.name}")
        return eos

    def _named(self, role: str) -> str | None:
        token = self.settings.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, in which nothing is special."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores. Raises TokenizerError if the tokenizer fails on one."""
        try:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a regular expression that gives up is a panic, which is not an Exception
            longest = max(texts, key=len)
            raise TokenizerError(f"{self.file}: fails on a text of up to {len(longest):,} characters "
                                 f"({printable(error, 200)}) that begins {printable(longest[:40])!r}; leave out texts "
                                 "of that length, or repair the patterns of its pre_tokenizer") from None

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, with control tokens spelled out."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `ids` piece by piece as they come; joined, it is `decode` of them all. A character of several
        tokens appears with its last token."""
        shown: list[int] = []  # the last tokens whose text is out: some decoders drop a space before the first token
        new: list[int] = []
        for token in ids:
            new.append(token)
            text = self.decode(shown + new)[len(self.decode(shown)) :]
            if text and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # what bytes of half a character look like
                yield text
                shown, new = new, []
        if rest := self.decode(shown + new)[len(self.decode(shown)) :]:
            yield rest


def _remedy(path: Path) -> str:
    if path.suffix == ".gguf" or any(path.glob("*.gguf")):
        return "GGUF files are not read: download the safetensors and the tokenizer.json that they were made from"
    if (path / "adapter_config.json").exists():
        return f"it holds an adapter: `minisft convert {path} TARGET --merge` makes one model of it and its base"
    return f"{FOLDER} (Meta's tokenizer.model is not read: use the one from the Hugging Face folder)"
