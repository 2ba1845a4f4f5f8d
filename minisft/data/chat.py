"""From a conversation to token ids, and which of them are trained.

A conversation is rendered to pieces, each of which carries its mask from the start. Text is never tokenised as a whole
and searched for its answers afterwards, which is how masks drift in other programs:

    control  <|begin_of_text|> <|start_header_id|>
    text     user
    control  <|end_header_id|>
    text     \\n\\nHi there
    control  <|eot_id|> <|start_header_id|>
    text     assistant
    control  <|end_header_id|>
    text     \\n\\n
    text     Hello!                                <- trained: the model starts here when it generates, so does a piece
    control  <|eot_id|>                            <- trained: without it the model never learns to stop

Templates are data (templates.toml): a model's own Jinja is a program from the network and is never executed. The
matching Jinja is written instead, beside a trained model, for the programs that serve it.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from itertools import chain
from pathlib import Path

from minisft.data.formats import Conversation, Turn
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError

VERSION = 3  # of reading and rendering: raise it when either changes, so that old tokens are not taken for new ones

TRAIN_ON = ("assistant", "last_assistant", "all")


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text or one control token, with its mask."""

    text: str
    control: bool
    trained: bool
    answer: bool = False  # the model's own text: tokenised alone, as it is generated, trained or not


@dataclass(frozen=True)
class Template:
    """How conversations look to the model; see templates.toml for the meaning of the fields."""

    name: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str, str]
    begin: str = ""
    document_end: str = ""
    trim: bool = False
    system_prefix: str = ""
    default_system: str | None = None
    default_system_context: str | None = None
    context: str = "{content}\n{context}"

    def turns(self, conversation: Conversation) -> tuple[Turn, ...]:
        """The turns as rendered: with the default system turn where one belongs."""
        turns = conversation.turns
        if turns[0].role == "system":
            return turns
        default = self.default_system
        if turns[0].context and self.default_system_context is not None:
            default = self.default_system_context
        return turns if default is None else (Turn("system", default), *turns)

    def content(self, turn: Turn) -> str:
        """A turn's text, joined with its context."""
        text = turn.content
        if turn.context:
            text = re.sub(r"\{(content|context)\}", lambda field: getattr(turn, field[1]), self.context)
        text = text.strip() if self.trim else text
        return self.system_prefix + text if turn.role == "system" else text

    def stop(self) -> str:
        """The text of the control token that ends an answer."""
        return self.assistant[1]


def load_templates(path: str | Path | None = None) -> dict[str, Template]:
    """The shipped templates, and those of the TOML file `path`. Raises UserError for a file of another form."""
    shipped = resources.files("minisft.data") / "templates.toml"
    templates = _parse(shipped.read_text(encoding="utf-8"), "templates.toml")
    if path:
        try:
            templates |= _parse(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: data.templates cannot be read: {error}") from None
    return templates


def _parse(text: str, file: str) -> dict[str, Template]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file}: not TOML: {error}") from None
    known = {field.name: str(field.type) for field in fields(Template)}
    templates = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{file}: {name}: expected a table [{name}] with the fields {', '.join(known)}")
        values: dict = {"name": name}
        for key, value in table.items():
            where = f"{file}: [{name}] {key}"
            if key not in known or key == "name":
                raise UserError(f"{where}: unknown; the fields are {', '.join(k for k in known if k != 'name')}")
            if known[key].startswith("tuple"):
                sizes = (2, 3) if key == "assistant" else (2,)
                strings = isinstance(value, list) and all(isinstance(v, str) for v in value)
                if not strings or len(value) not in sizes:
                    raise UserError(f"{where}: expected [before, after], two strings; found {value!r}")
                value = (*value, "") if key == "assistant" and len(value) == 2 else tuple(value)
            elif not isinstance(value, bool if key == "trim" else str):
                kind = "true or false" if key == "trim" else "a string"
                raise UserError(f"{where}: expected {kind}; found {value!r}")
            values[key] = value
        missing = [key for key in ("system", "user", "assistant") if key not in values]
        if missing:
            raise UserError(f"{file}: [{name}]: {', '.join(missing)} missing")
        if not values["assistant"][1]:
            raise UserError(f"{file}: [{name}] assistant: nothing ends the answer, so the model would never stop; "
                            "give the stop token as the second item")
        context = values.get("context", Template.context)
        if "{content}" not in context or "{context}" not in context:
            raise UserError(f"{file}: [{name}] context: {{content}} and {{context}} must both stand in it; "
                            f"found {context!r}")
        templates[name] = Template(**values)
    return templates


def recognize(jinja: object) -> tuple[str, str | None] | None:
    """The template's name and default system text that a model's own Jinja stands for; None where it is unknown.

    The Jinja is looked at, not executed. One that does more than our templates is unknown: it reasons, puts a system
    text into a variable, does not trim as Llama-3 does, or begins ChatML with a token of its own.
    """
    if not isinstance(jinja, str) or re.search(r"<think>|set\s+\w*system\w*\s*=\s*(['\"])(?!\1)", jinja):
        return None
    header, line = r"<\|start_header_id\|>{}<\|end_header_id\|>(?:\\n|\n){{2}}", r"<\|im_start\|>{}(?:\\n|\n)"
    if re.search(header.format("assistant"), jinja) and re.search(r"\|\s*trim", jinja):
        if "Cutting Knowledge Date" in jinja:
            return "llama3.1", ""
        return "llama3", _default_system(jinja, header.format("system"), r"<\|eot_id\|>")
    if re.search(line.format("assistant"), jinja) and "bos_token" not in jinja:
        return "chatml", _default_system(jinja, line.format("system"), r"<\|im_end\|>")
    return None


def _default_system(jinja: str, before: str, after: str) -> str | None:
    """The system text that stands between two patterns in a string of the Jinja, or outside of any {{ }}."""
    if string := re.search(rf"(['\"]){before}((?:\\.|(?!\1)[^\\])+?){after}", jinja, re.DOTALL):
        return string[2].encode("ascii", "backslashreplace").decode("unicode-escape")  # as Jinja reads a string
    outside = re.search(rf"(?:^|[}}\n]){before}([^{{}}]+?){after}", jinja)
    return outside[1] if outside else None


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    merged: list[Piece] = []
    last = None  # the piece before, where it is text that may grow
    for piece in pieces:
        if piece.control or piece.answer:
            merged.append(piece)
            last = None
        elif last is not None and last.trained == piece.trained:
            merged[-1] = last = Piece(last.text + piece.text, False, piece.trained)
        else:
            merged.append(piece)
            last = piece
    return merged


class Renderer:
    """A template applied with a tokenizer.

    Raises UserError where the template's control tokens are not the tokenizer's.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, *, train_on: str = "assistant"):
        self.template, self.tokenizer, self.train_on = template, tokenizer, train_on
        self._marker = cache(lambda marker, trained: tuple(self._marked(marker, trained)))  # every turn asks again
        names = sorted(tokenizer.control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        for field in ("begin", "system", "user", "assistant", "document_end"):
            value = getattr(template, field)
            marker = self._fill(value if isinstance(value, str) else "".join(value))
            for name in re.findall(r"<\|[^|<>]+\|>", marker):
                if name not in tokenizer.control:
                    raise UserError(f"template {template.name}: {field} has {name}, which is not a special token of "
                                    f"{tokenizer.file}; choose a template that fits the tokenizer, or add the token")
        if not self._control.search(stop := self._fill(template.stop())):
            raise UserError(f"template {template.name}: assistant ends with {stop!r}, in which there is no special "
                            f"token of {tokenizer.file}; the model would never stop")
        self._control_ids = frozenset(tokenizer.control.values())

    def fingerprint(self) -> list:
        """Everything that token ids and masks depend on, besides the conversation."""
        template = {name: self._fill(v) if isinstance(v, str) else v for name, v in asdict(self.template).items()}
        ends = [self._fill("".join(marker)) for marker in (self.template.user, self.template.assistant)]
        return [VERSION, self.tokenizer.sha256, self.train_on, template, ends]

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """The rendered conversation; text between two control tokens is one piece, but for answers and their masks."""
        return _merged(self._rendered(conversation))

    def prompt(self, turns: tuple[Turn, ...]) -> list[int]:
        """Token ids of `turns`, up to where the assistant's answer begins."""
        rendered = self._rendered(Conversation(turns, source="", line=0))
        answer = self._marker(self.template.assistant[0], self.train_on == "all")
        return self.encode([_merged(chain(rendered, answer))])[0][0]

    def stop_ids(self) -> set[int]:
        """The tokens at which generation ends: the template's stop token and the end of a plain text."""
        markers = (self.template.stop(), self.template.document_end)
        names = [name for marker in markers for name in self._control.findall(self._fill(marker))]
        return {self.tokenizer.control[name] for name in names}

    def encode(self, rendered: list[list[Piece]]) -> list[tuple[list[int], list[bool]]]:
        """Token ids and mask of many rendered conversations, tokenised together on all cores."""
        texts = [piece.text for pieces in rendered for piece in pieces if not piece.control]
        encoded = iter(self.tokenizer.encode_batch(texts))
        documents = []
        for pieces in rendered:
            ids: list[int] = []
            trained: list[bool] = []
            for piece in pieces:
                new = [self.tokenizer.control[piece.text]] if piece.control else next(encoded)
                assert piece.control or self._control_ids.isdisjoint(new), "text became a control token"
                ids += new
                trained += [piece.trained] * len(new)
            if trained:
                trained[0] = False  # nothing comes before it that could predict it
            documents.append((ids, trained))
        return documents

    def _rendered(self, conversation: Conversation) -> Iterator[Piece]:
        template, everything = self.template, self.train_on == "all"
        yield from self._marker(template.begin, False)
        if conversation.turns[0].role == "text":
            yield Piece(conversation.turns[0].content, False, True)
            yield from self._marker(template.document_end, True)
            return
        turns = template.turns(conversation)
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
        for i, turn in enumerate(turns):
            before, after, *rest = getattr(template, turn.role)
            answer = turn.role == "assistant" and turn.trained and (self.train_on != "last_assistant" or i == last)
            context = everything and turn.trained
            yield from self._marker(before, context)
            if text := template.content(turn):
                yield Piece(text, False, answer or context, answer=turn.role == "assistant")
            yield from self._marker(after, answer or context)
            yield from self._marker("".join(rest), context)

    def _marked(self, marker: str, trained: bool) -> Iterator[Piece]:
        """The template's own text: `<|eot_id|>\\n` -> control `<|eot_id|>`, text `\\n`."""
        marker, end = self._fill(marker), 0
        for match in self._control.finditer(marker):
            if match.start() > end:
                yield Piece(marker[end : match.start()], False, trained)
            yield Piece(match[0], True, trained)
            end = match.end()
        if end < len(marker):
            yield Piece(marker[end:], False, trained)

    def _fill(self, marker: str) -> str:
        if "{bos}" in marker:
            marker = marker.replace("{bos}", self.tokenizer.bos)
        return marker.replace("{eos}", self.tokenizer.eos) if "{eos}" in marker else marker

    def jinja(self) -> str:
        """The same template as the Jinja text that transformers, vLLM and others execute."""
        template = self.template

        def text(marker: str) -> str:
            escaped = self._fill(marker).replace("\\", "\\\\").replace("'", "\\'")
            escaped = escaped.replace("\n", "\\n").replace("\r", "\\r")  # Jinja would read a bare \r as \n
            return f"{{{{- '{escaped}' }}}}" if marker else ""

        content = "message['content'] | trim" if template.trim else "message['content']"
        lines = [text(template.begin)]
        if template.default_system is not None:
            default = template.content(Turn("system", template.default_system))
            lines += ["{%- if messages[0]['role'] != 'system' %}",
                      text(template.system[0] + default + template.system[1]), "{%- endif %}"]
        lines += ["{%- for message in messages %}"]
        for role, prefix in (("system", template.system_prefix), ("user", ""), ("assistant", "")):
            before, *after = getattr(template, role)
            lines += [f"{{%- {'if' if role == 'system' else 'elif'} message['role'] == '{role}' %}}",
                      text(before + prefix) + f"{{{{- {content} }}}}" + text("".join(after))]
        lines += ["{%- endif %}", "{%- endfor %}", "{%- if add_generation_prompt %}", text(template.assistant[0]),
                  "{%- endif %}"]
        return "".join(lines)
