"""Tokenised conversations in memory-mapped files, made once and found again by their content.

    <cache>/<key>/tokens.bin    uint32, all documents one after another
                  trained.bin   uint8, 1 where the token is trained
                  offsets.npy   (documents + 1,) int64
                  targets.npy   (documents,) int64: trained tokens of each
                  turns.npy     (documents,) int64: turns of each
                  largest.npy   (documents,) int64: the largest token id of each
                  lines.npy     (documents,) int64: where each came from
                  hashes.npy    (documents,) uint64: of ids and mask, equal for exact duplicates
                  loose.npy     (documents,) uint64: of letters and digits alone, equal for near-exact duplicates
                  report.json   what was read, kept, and left out for which reason; the sizes of the files above

The key is a hash of everything that the tokens depend on: the file's bytes, how it is read, the tokenizer, the
template, which tokens are trained, the version of the renderer. A folder appears under its name in one rename, so one
that exists is complete; of several processes that want it, one makes it and the others wait. `seq_len` is not part of
it: what is too long is decided when a run opens the data (dataset.py).

The file is read and rendered in one thread while the batch before is tokenised; the tokenizer brings its own threads.
Batches are bounded by characters, so that the memory needed does not grow with the file but for 56 bytes a document.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minisft.data.chat import Renderer
from minisft.data.checks import Laws
from minisft.data.conversation import Conversation, Skipped
from minisft.data.digest import content_digest, file_state
from minisft.data.encoding import Documents, Rendered, encode, loose_hash, render
from minisft.data.fields import Fields
from minisft.data.formats import read
from minisft.data.records import open_data
from minisft.data.tokenizer import TokenizerError
from minisft.errors import UserError

LAYOUT = 5  # of these files: raise it when they change, so that old folders are not opened
BATCH = 1024  # conversations that are tokenised together
BATCH_CHARACTERS = 1 << 22  # or fewer, where they are long
ARRAYS = ("offsets", "targets", "turns", "largest", "lines", "hashes", "loose")
BROKEN = ("bad JSON", "invalid UTF-8")  # reasons that count against max_bad: the record itself, not what it says


@dataclass
class Report:
    """What became of a file. Counts of tokens are of the documents kept."""

    name: str
    path: str
    template: str
    sha256: str = ""  # of the file's bytes
    read: int = 0
    kept: int = 0
    turns: int = 0
    words: int = 0  # of the contents, as white space separates them
    content_tokens: int = 0  # of the contents, without the template's own; per word they tell what a language costs
    tokens: int = 0
    target_tokens: int = 0
    largest_id: int = 0  # to be held against the model's vocabulary
    truncated: int = 0
    duplicates: int = 0  # documents that are exactly another one before them, here or in an earlier source
    lost_target_tokens: int = 0  # trained tokens of documents that were too long
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> conversations left out
    changed: dict[str, int] = field(default_factory=dict)  # what was done to a conversation -> conversations
    examples: dict[str, str] = field(default_factory=dict)  # reason -> where it was first met
    unread: dict[str, int] = field(default_factory=dict)  # field that nothing reads -> records that have it

    def skip(self, reason: str, where: str, count: int = 1) -> None:
        """Count conversations left out, and remember the first."""
        self.skipped[reason] = self.skipped.get(reason, 0) + count
        self.examples.setdefault(reason, where)

    def change(self, note: str, where: str) -> None:
        """Count a conversation that is kept, but not as it was, and remember the first."""
        self.changed[note] = self.changed.get(note, 0) + 1
        self.examples.setdefault(note, where)


class Store:
    """The documents of one file, opened from its folder. Raises UserError for a folder that lost some of its bytes."""

    def __init__(self, folder: Path):
        self.key = folder.name
        try:
            saved = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            self.report = Report(**saved["report"])
            for name, size in saved["sizes"].items():
                if (found := (folder / name).stat().st_size) != size:
                    raise ValueError(f"{name} has {found:,} of {size:,} bytes")
            self.offsets, self.targets, self.turns, self.largest, self.lines, self.hashes, self.loose = (
                np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
            if len(self):  # an empty file cannot be mapped
                size = int(self.offsets[-1])
                self.tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r", shape=size)
                self.trained = np.memmap(folder / "trained.bin", dtype=np.uint8, mode="r", shape=size)
        except (FileNotFoundError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(f"{folder}: damaged ({error}); delete the folder, and it is made again") from None

    def __len__(self) -> int:
        return len(self.lines)


def open_store(path: str, *, name: str, format: str, renderer: Renderer, cache: Path, skip_bad: bool = False,
               max_bad: int = 100, oasst: str = "all", ignore: tuple[str, ...] = (), quiet: bool = False) -> Store:
    """The tokenised documents of file `path`; tokenised now if that has not been done before.

    Raises UserError for a file that cannot be read, that has more than `max_bad` broken records with `skip_bad`, or
    whose tokens break a law (checks.py).
    """
    state = file_state(path)
    with open_data(path, json_expected=False):
        pass  # what is of another kind is refused before all of it is read
    sha256 = content_digest(path, cache)
    settings = [LAYOUT, sha256, name, path, format, skip_bad, max_bad, oasst,
                sorted(ignore), renderer.fingerprint()]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / key
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with _only_process(cache / f"{key}.lock"):
            if not folder.exists():
                partial = cache / f"{key}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    fields, report = Fields(ignore), Report(name, path, renderer.template.name, sha256)
                    report.unread = fields.unread
                    conversations = read(path, format=format, skip_bad=skip_bad, oasst=oasst, fields=fields)
                    bar = tqdm(conversations, desc=f"tokenise {name}", unit=" conversations", disable=quiet or None)
                    _write(partial, iter(bar), renderer, report, max_bad)
                    if file_state(path) != state:  # its tokens would be found under the key of what it was before
                        raise UserError(f"{path}: changed while it was read; start again when it is complete")
                    os.rename(partial, folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return Store(folder)


@contextmanager
def _only_process(lock: Path) -> Iterator[None]:
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go of it when a process dies
        yield


@dataclass
class Batch:
    """Records that are tokenised together, in the file's order."""

    rendered: Rendered
    loose: list[int]
    skipped: list[Skipped]


def _write(folder: Path, conversations: Iterator[Conversation | Skipped], renderer: Renderer, report: Report,
           max_bad: int) -> None:
    laws, end = Laws(renderer), 0
    chunks: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "trained.bin", "wb") as trained_file:
        for batch in _ahead(_batches(conversations, renderer)):
            documents = _encoded(batch, renderer)
            _count_skipped(report, batch.skipped, max_bad)
            report.read += len(batch.rendered.conversations) + len(batch.skipped)
            learnable = documents.targets() > 0
            for i in np.flatnonzero(~learnable):
                where = batch.rendered.conversations[i]
                report.skip("nothing trained", f"{where.source}:{where.line}")
            documents = documents.only(learnable)
            kept = [batch.rendered.conversations[i] for i in np.flatnonzero(learnable)]
            laws.check(documents, kept)
            tokens, trained = documents.ids.tobytes(), documents.trained.tobytes()
            tokens_file.write(tokens)
            trained_file.write(trained)
            chunks["offsets"].append(end + documents.offsets[:-1])
            chunks["targets"].append(documents.targets())
            chunks["turns"].append(np.array([len(conversation.turns) for conversation in kept], dtype=np.int64))
            if kept:  # reduceat needs a document
                chunks["largest"].append(np.maximum.reduceat(documents.ids, documents.offsets[:-1]))
            chunks["lines"].append(np.array([conversation.line for conversation in kept], dtype=np.int64))
            chunks["hashes"].append(_hashes(tokens, trained, documents.offsets))
            chunks["loose"].append(np.array(batch.loose, dtype=np.uint64)[learnable])
            end += len(documents.ids)
            _count_kept(report, documents, kept)
    chunks["offsets"].append(np.array([end]))
    for name, arrays in chunks.items():
        dtype = np.uint64 if name in ("hashes", "loose") else np.int64
        np.save(folder / f"{name}.npy", np.concatenate([np.zeros(0, dtype), *arrays], dtype=dtype))
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    (folder / "report.json").write_text(json.dumps({"report": asdict(report), "sizes": sizes}, ensure_ascii=False),
                                        encoding="utf-8")


def _batches(items: Iterator[Conversation | Skipped], renderer: Renderer) -> Iterator[Batch]:
    conversations, skipped, characters = [], [], 0
    for item in map(renderer.renderable, items):
        if isinstance(item, Conversation):
            conversations.append(item)
            characters += sum([len(turn.content) + len(turn.context) for turn in item.turns])
        else:
            skipped.append(item)
        if len(conversations) + len(skipped) >= BATCH or characters > BATCH_CHARACTERS:
            yield Batch(render(conversations, renderer), [loose_hash(c) for c in conversations], skipped)
            conversations, skipped, characters = [], [], 0
    if conversations or skipped:
        yield Batch(render(conversations, renderer), [loose_hash(c) for c in conversations], skipped)


def _encoded(batch: Batch, renderer: Renderer) -> Documents:
    """The documents of `batch`, without those whose text the tokenizer cannot take: they join the skipped."""
    try:
        return encode(batch.rendered, renderer)
    except TokenizerError:
        conversations, loose = batch.rendered.conversations, batch.loose
        good = []
        for i, conversation in enumerate(conversations):
            try:
                encode(render([conversation], renderer), renderer)
                good.append(i)
            except TokenizerError as error:
                batch.skipped.append(Skipped("the tokenizer cannot take this text", str(error), conversation.source,
                                             conversation.line))
        batch.rendered, batch.loose = render([conversations[i] for i in good], renderer), [loose[i] for i in good]
        return encode(batch.rendered, renderer)


def _ahead(items: Iterator[Batch]) -> Iterator[Batch]:
    """The same items; the next is made in a thread while the caller works on this one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


def _hashes(tokens: bytes, trained: bytes, offsets: np.ndarray) -> np.ndarray:
    ends = offsets.tolist()
    digests = [hashlib.blake2b(tokens[4 * start : 4 * stop] + trained[start:stop], digest_size=8).digest()
               for start, stop in pairwise(ends)]
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _count_skipped(report: Report, skipped: list[Skipped], max_bad: int) -> None:
    for item in skipped:
        report.skip(item.reason, f"{item.source}:{item.line}: {item.detail}")
    broken = [reason for reason in report.skipped if reason in BROKEN]
    if sum(report.skipped[reason] for reason in broken) > max_bad:
        raise UserError(f"{report.path}: more than data.max_bad = {max_bad} broken records; the first: "
                        f"{report.examples[broken[0]]}")


def _count_kept(report: Report, documents: Documents, kept: list[Conversation]) -> None:
    for conversation in kept:
        for note in conversation.notes:
            report.change(note, f"{conversation.source}:{conversation.line}")
    report.kept += len(kept)
    report.turns += sum([len(conversation.turns) for conversation in kept])
    report.words += int(documents.words.sum())
    report.content_tokens += int(documents.content_tokens.sum())
    report.tokens += len(documents.ids)
    report.target_tokens += int(documents.trained.sum())
    report.largest_id = max(report.largest_id, int(documents.ids.max(initial=0)))
