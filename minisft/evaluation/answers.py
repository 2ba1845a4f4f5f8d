"""Answers to question files, kept in FastChat's layout of MT-Bench, so that any judge can score them.

    {"question_id": 101, "answer_id": "...", "model_id": "my/final",
     "choices": [{"index": 0, "turns": ["first answer", "second answer"], "cut": [false, true]}], "tstamp": 17e8}

"cut" is ours: whether an answer was as long as it may be, and probably not at its end. FastChat does not mind it.
One line a question, in the order of the question file. The second turn is asked after the first answer. A line is
written whole as soon as its questions are answered, so a command that was stopped goes on behind the last whole line.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from minisft.data.chat import Renderer
from minisft.data.conversation import Turn
from minisft.errors import PATH, SHORT, UserError, printable
from minisft.evaluation.prompts import Question, json_lines, texts

MAX_NEW_TOKENS = 1024  # FastChat's default


class Answering(Protocol):
    """What is asked: an Assistant, or anything that answers like one."""

    @property
    def renderer(self) -> Renderer:
        """Of its chat template."""
        ...

    def answer(self, conversations: Sequence[tuple[Turn, ...]], *, max_new_tokens: int) -> list[str]:
        """The next turn of each conversation."""
        ...


def in_batches(assistant: Answering, conversations: Sequence[tuple[Turn, ...]], *, max_new_tokens: int, batch: int,
               doing: str = "") -> list[str]:
    """The next turn of each conversation, `batch` of them at a time; `doing` names the bar of progress."""
    answers: list[str] = []
    with tqdm(total=len(conversations), desc=doing, unit="answer", leave=False, disable=not doing) as progress:
        for start in range(0, len(conversations), batch):
            some = conversations[start : start + batch]
            answers += assistant.answer(some, max_new_tokens=max_new_tokens)
            progress.update(len(some))
    return answers


def answer_turns(assistant: Answering, questions: list[Question], *, max_new_tokens: int) -> list[list[str]]:
    """All turns of `questions`, asked side by side; each turn sees the answers before it."""
    talks: list[tuple[Turn, ...]] = [() for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [i for i, question in enumerate(questions) if turn < len(question.turns)]
        for i in asked:
            talks[i] += (Turn("user", questions[i].turns[turn]),)
        found = assistant.answer([talks[i] for i in asked], max_new_tokens=max_new_tokens)
        for i, text in zip(asked, found, strict=True):
            talks[i] += (Turn("assistant", text),)
    return [[turn.content for turn in talk if turn.role == "assistant"] for talk in talks]


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Hold a file of answers. Raises UserError while another process does: both would ask everything."""
    with open(os.open(file, os.O_RDONLY | os.O_CREAT, 0o666)) as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{printable(file, PATH)}: another process is writing answers there; wait for it, or give "
                            "another --out") from None
        try:
            yield
        finally:
            if not os.stat(held.fileno()).st_size:
                file.unlink(missing_ok=True)  # nothing came of it


def write_answers(assistant: Answering, questions: list[Question], file: Path, *, model_id: str,
                  max_new_tokens: int = MAX_NEW_TOKENS, batch: int = 8) -> None:
    """Append to `file` the answers that it lacks."""
    missing = unanswered(questions, file, model_id=model_id)
    with open(file, "ab") as out, tqdm(total=len(missing), desc=printable(model_id), unit="question",
                                       leave=False) as progress:
        for start in range(0, len(missing), batch):
            some = missing[start : start + batch]
            for question, turns in zip(some, answer_turns(assistant, some, max_new_tokens=max_new_tokens), strict=True):
                cut = [cut_off(assistant, text, max_new_tokens) for text in turns]
                out.write(_line(question, turns, cut, model_id).encode())
            out.flush()
            os.fsync(out.fileno())
            progress.update(len(some))


def cut_off(assistant: Answering, text: str, max_new_tokens: int) -> bool:
    """Whether an answer is as long as it may be, within two tokens: encoding anew may join some at the end."""
    return len(assistant.renderer.tokenizer.encode(text)) >= max(1, max_new_tokens - 2)


def _line(question: Question, turns: list[str], cut: list[bool], model_id: str) -> str:
    name = hashlib.sha256(json.dumps([model_id, question.id, turns]).encode()).hexdigest()[:22]
    return json.dumps({"question_id": question.id, "answer_id": name, "model_id": model_id,
                       "choices": [{"index": 0, "turns": turns, "cut": cut}], "tstamp": time.time()},
                      ensure_ascii=False) + "\n"


def unanswered(questions: list[Question], file: Path, *, model_id: str) -> list[Question]:
    """The questions whose answers `file` lacks. A last line that was cut off in writing is removed from the file, and
    one that lacks its newline gets it.

    Raises UserError for a file of another kind or another model, which stays as it is.
    """
    whole = file.read_bytes() if file.exists() else b""
    if whole.lstrip().startswith(b"["):
        raise UserError(f"{file}: is one JSON list, and answers are appended line by line; give another --out")
    end = whole.rfind(b"\n") + 1
    kept = whole[:end] if _cut_in_writing(whole[end:]) else whole
    done: Collection[int | str] = ()
    if kept:
        found = read_answers(file, end=len(kept))
        if found.model_id != model_id:
            raise UserError(f"{file}: holds the answers of {SHORT.repr(found.model_id)}, not of "
                            f"{SHORT.repr(model_id)}; give another --out")
        done = found.turns
    if whole[end:]:
        with open(file, "ab") as out:
            out.truncate(len(kept))
            out.write(b"\n" * (len(kept) > end))
    return [question for question in questions if question.id not in done]


def _cut_in_writing(line: bytes) -> bool:
    """Whether `line` is the beginning of an answer's line, and not a whole one that only lacks its newline."""
    begins = b'{"question_id": '
    try:
        json.loads(line)
    except ValueError:
        return line[: len(begins)] == begins[: len(line)]
    return False


@dataclass(frozen=True)
class Answers:
    """A file of answers: whose they are, and the turns by question."""

    model_id: str
    turns: dict[int | str, tuple[str, ...]]
    cut: list[bool] | None  # of all turns, where the file says it of every one


def read_answers(file: Path, *, end: int | None = None) -> Answers:
    """The answers of one model, in a file or in its first `end` bytes. Of several choices the first counts.

    Raises UserError, with file and line.
    """
    turns: dict[int | str, tuple[str, ...]] = {}
    models: set[str] = set()
    cut: dict[int | str, list[bool]] = {}
    for line, record in json_lines(file, end=end):
        where = f"{file}:{line}"
        number, model, choices = record.get("question_id"), record.get("model_id"), record.get("choices")
        if not isinstance(number, int | str) or not isinstance(model, str):
            raise UserError(f"{where}: needs question_id, and model_id that is text")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise UserError(f"{where}: choices must be a list such as [{{\"index\": 0, \"turns\": [\"...\"]}}]")
        models.add(model)
        turns[number] = texts(choices[0].get("turns"), f"{where}: choices[0].turns")
        if isinstance(said := choices[0].get("cut"), list) and len(said) == len(turns[number]):
            cut[number] = [bool(one) for one in said]
    if not models:
        raise UserError(f"{file}: holds no answers")
    if len(models) != 1:
        raise UserError(f"{file}: holds the answers of {len(models)} models; one file a model")
    return Answers(models.pop(), turns, [one for said in cut.values() for one in said] if cut.keys() == turns.keys()
                   else None)


def model_name(path: str | Path) -> str:
    """What a model folder is called in files: its name, and for a run's `final` the run's as well."""
    folder = Path(path).resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name == "final" else folder.name
