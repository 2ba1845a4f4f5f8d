"""Answers to prompt files, stored in FastChat's layout of MT-Bench so that any judge can score them.

    {"question_id": 101, "answer_id": "...", "model_id": "my/final",
     "choices": [{"index": 0, "turns": ["first answer", "second answer"], "cut": [false, true]}], "tstamp": 17e8}

"cut" is our addition, which FastChat ignores: whether an answer reached the token limit and was probably cut off. There
is one line per prompt, in the order of the prompt file. A model gets the second turn after it has answered the first. A
line is written whole as soon as its prompt is answered, so an interrupted command resumes after the last whole line.
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

from tqdm import tqdm

from minisft.data.conversation import Turn
from minisft.errors import PATH, SHORT, UserError, printable
from minisft.evals.prompts import Prompt, json_lines, texts
from minisft.generate.assistant import Assistant


@dataclass(frozen=True)
class Answers:
    """A file of answers."""

    model_id: str
    turns: dict[int | str, tuple[str, ...]]  # by prompt
    cut: list[bool] | None  # of all turns; None unless the file has it for every one


def in_batches(assistant: Assistant, conversations: Sequence[tuple[Turn, ...]], *, max_new_tokens: int, batch: int,
               name: str) -> list[str]:
    """The next turn of each conversation, `batch` at a time; `name` is shown by the progress bar."""
    answers: list[str] = []
    with tqdm(total=len(conversations), desc=name, unit="answer", leave=False) as progress:
        for start in range(0, len(conversations), batch):
            answers += assistant.answer(conversations[start : start + batch], max_new_tokens=max_new_tokens)
            progress.update(len(answers) - progress.n)
    return answers


def answer_turns(assistant: Assistant, prompts: list[Prompt], *, max_new_tokens: int) -> list[list[str]]:
    """Answers to all turns of `prompts`, as one batch; each turn follows the answers before it."""
    talks: list[tuple[Turn, ...]] = [() for _ in prompts]
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        live = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns)]
        for i in live:
            talks[i] += (Turn("user", prompts[i].turns[turn]),)
        answers = assistant.answer([talks[i] for i in live], max_new_tokens=max_new_tokens)
        for i, text in zip(live, answers, strict=True):
            talks[i] += (Turn("assistant", text),)
    return [[turn.content for turn in talk if turn.role == "assistant"] for talk in talks]


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Lock a file of answers. Raises UserError if another process holds it: both would answer everything."""
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
                file.unlink(missing_ok=True)


def write_answers(assistant: Assistant, prompts: list[Prompt], file: Path, *, model_id: str, max_new_tokens: int = 1024,
                  batch: int = 8) -> None:
    """Append the answers that `file` lacks."""
    missing = unanswered(prompts, file, model_id=model_id)
    with open(file, "ab") as out, tqdm(total=len(missing), desc=printable(model_id), unit="question",
                                       leave=False) as progress:
        for start in range(0, len(missing), batch):
            some = missing[start : start + batch]
            for prompt, turns in zip(some, answer_turns(assistant, some, max_new_tokens=max_new_tokens), strict=True):
                # Within two tokens of the limit: encoding the text again may merge some at its end.
                cut = [len(assistant.renderer.tokenizer.encode(text)) >= max(1, max_new_tokens - 2) for text in turns]
                name = hashlib.sha256(json.dumps([model_id, prompt.id, turns]).encode()).hexdigest()[:22]
                line = {"question_id": prompt.id, "answer_id": name, "model_id": model_id,
                        "choices": [{"index": 0, "turns": turns, "cut": cut}], "tstamp": time.time()}
                out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
            progress.update(len(some))


def unanswered(prompts: list[Prompt], file: Path, *, model_id: str) -> list[Prompt]:
    """The prompts that `file` has no answer to.

    Repairs the end of the file: removes a last line that was cut off while writing, and completes one that only lacks
    its newline. Raises UserError for a file of another kind or another model, which is left unchanged.
    """
    content = file.read_bytes() if file.exists() else b""
    if content.lstrip().startswith(b"["):
        raise UserError(f"{file}: is one JSON list, and answers are appended line by line; give another --out")
    end = content.rfind(b"\n") + 1
    last, beginning = content[end:], b'{"question_id": '
    try:
        json.loads(last)
        is_cut = False
    except ValueError:
        is_cut = last[: len(beginning)] == beginning[: len(last)]
    size = end if is_cut else len(content)
    done: Collection[int | str] = ()
    if size:
        found = read_answers(file, end=size)
        if found.model_id != model_id:
            raise UserError(f"{file}: holds the answers of {SHORT.repr(found.model_id)}, not of "
                            f"{SHORT.repr(model_id)}; give another --out")
        done = found.turns
    if last:
        with open(file, "ab") as out:
            out.truncate(size)
            out.write(b"" if is_cut else b"\n")
    return [prompt for prompt in prompts if prompt.id not in done]


def read_answers(file: Path, *, end: int | None = None) -> Answers:
    """One model's answers, in a file or in its first `end` bytes. Of several choices the first counts.

    Raises UserError with file and line.
    """
    turns: dict[int | str, tuple[str, ...]] = {}
    cut: dict[int | str, list[bool]] = {}
    models: set[str] = set()
    for line, record in json_lines(file, end=end):
        where = f"{file}:{line}"
        number, model, choices = record.get("question_id"), record.get("model_id"), record.get("choices")
        if not isinstance(number, int | str) or not isinstance(model, str):
            raise UserError(f"{where}: needs question_id, and model_id that is text")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise UserError(f"{where}: choices must be a list such as [{{\"index\": 0, \"turns\": [\"...\"]}}]")
        models.add(model)
        turns[number] = texts(choices[0].get("turns"), f"{where}: choices[0].turns")
        if isinstance(flags := choices[0].get("cut"), list) and len(flags) == len(turns[number]):
            cut[number] = [bool(flag) for flag in flags]
    if len(models) != 1:
        raise UserError(f"{file}: holds the answers of {len(models)} models; keep one model per file" if models else
                        f"{file}: holds no answers")
    is_known = cut.keys() == turns.keys()
    return Answers(models.pop(), turns, [flag for flags in cut.values() for flag in flags] if is_known else None)


def model_name(path: str | Path) -> str:
    """A model folder's name in files: its own, and for a run's `final` also the run's."""
    folder = Path(path).resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name == "final" else folder.name
