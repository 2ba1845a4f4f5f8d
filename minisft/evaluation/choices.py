"""Multiple choice by log-likelihood: which choice does the model find the most probable to follow the question?

    letter   The following are multiple choice questions (with answers) about astronomy.
             (blank line)
             How many moons has Mars?
             A. one
             B. two
             Answer:                            scored: " A", " B"

    text     Question: How many moons has Mars?
             Answer:                            scored: " one", " two"

A choice scores log p(its tokens | prompt), summed; `acc` takes the best sum. Long texts are less probable than short
ones whatever they say, so `acc_norm` divides by the choice's characters first, and `acc_bytes` by its bytes (one and
two, for ş). Prompts, tokens and figures are those of lm-evaluation-harness (Gao et al. 2021): `letter` is its mmlu
and turkishmmlu, `text` its arc_easy; docs/evaluation.md compares them.

Prompts and their choices are documents in a stream, as in training. Only the hidden states that predict a choice's
tokens reach the head. Choices of one token share their document: all letters of a question cost one.
"""

# T tokens in the stream, D model width, V vocabulary; n tokens that are scored

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minisft.data.conversation import Turn
from minisft.data.tokenizer import Tokenizer
from minisft.errors import PATH, UserError, printable
from minisft.evaluation.assistant import Assistant
from minisft.evaluation.decoding import logits
from minisft.evaluation.interval import wilson
from minisft.evaluation.questions import LETTERS, Question, read
from minisft.model.llama import Documents

STYLES = ("letter", "text")
WORDS = {"en": ("Question:", "Answer:"), "tr": ("Soru:", "Cevap:")}
LOGITS = 2**24  # that exist at one time
SCORES = ("acc", "acc_norm", "acc_bytes")

Request = tuple[list[int], list[int]]  # token ids of a prompt, and of what may follow it


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as it is put to the model."""

    question: Question
    style: str
    shots: tuple[Question, ...] = ()  # asked and answered before it

    def user(self, question: Question) -> str:
        """What is asked, up to the word after which the answer stands."""
        asks, answers = WORDS[self.question.language]
        text = question.text.strip()
        if self.style == "text":
            return f"{asks} {text}\n{answers}"
        lettered = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
        head = text if self.question.format == "mmlu" and self.question.language == "en" else f"{asks} {text}"
        return "\n".join([head, *lettered, answers])

    def said(self, question: Question, choice: int) -> str:
        """How a choice is said: its letter, or its text."""
        return LETTERS[choice] if self.style == "letter" else question.choices[choice]

    def opening(self) -> str:
        """MMLU's first line."""
        question = self.question
        if self.style == "text" or question.format != "mmlu" or question.language != "en":
            return ""
        return f"The following are multiple choice questions (with answers) about {question.subject}.\n\n"

    def text(self) -> str:
        """The prompt as plain text, solved questions first."""
        solved = [f"{self.user(shot)} {self.said(shot, shot.answer)}\n\n" for shot in self.shots]
        return "".join([self.opening(), *solved, self.user(self.question)])

    def turns(self) -> tuple[Turn, ...]:
        """The prompt as turns of a chat; what opens the text stands in the first."""
        turns: list[Turn] = []
        for shot in self.shots:
            turns += Turn("user", self.user(shot)), Turn("assistant", self.said(shot, shot.answer))
        first, *rest = *turns, Turn("user", self.user(self.question))
        return Turn("user", self.opening() + first.content), *rest


def ask(files: list[str], *, format: str = "auto", language: str = "", style: str | None = None, shots: int = 0,
        shots_from: Iterable[str] = (), limit: int | None = None) -> list[Asked]:
    """The questions of `files`, the first `limit` of each, with `shots` answered ones before each.

    These are the first of the same subject in `shots_from`, or of all questions there where it has none of the
    subjects asked; without `shots_from`, among the questions of `files`. A question is never its own shot.
    """
    sets = [read(file, format=format, language=language) for file in files]
    pool = [q for file in shots_from for q in read(file, format=format, language=language)]
    pool = pool or list(chain.from_iterable(sets))
    questions = [question for found in sets for question in found[:limit]]
    by_subject = bool({q.subject for q in pool} & {q.subject for q in questions})
    asked = []
    for question in questions:
        others = (q for q in pool if (q.text, q.choices) != (question.text, question.choices)
                  and (q.subject == question.subject or not by_subject))
        chosen = tuple(other for other, _ in zip(others, range(shots), strict=False))
        if len(chosen) < shots:
            raise UserError(f"{question.where}: --shots {shots}, but there are {len(chosen)} other questions about "
                            f"{printable(repr(question.subject))}; ask for fewer, or name files that have them "
                            "with --shots-from")
        asked.append(Asked(question, style or ("text" if question.format == "arc" else "letter"), chosen))
    return asked


def figures(assistant: Assistant, asked: list[Asked], *, chat: bool = False,
            batch_tokens: int = 8192) -> dict[str, Any]:
    """Accuracies with 95% intervals, over all questions and by subject, and the log-likelihoods of every choice."""
    requests = [in_turns(assistant, each) if chat else as_text(assistant.renderer.tokenizer, each) for each in asked]
    longest = assistant.model.config.max_position_embeddings
    for each, choices in zip(asked, requests, strict=True):
        tokens = max(len(prompt) + len(continuation) - 1 for prompt, continuation in choices)
        if tokens > longest:
            raise UserError(f"{each.question.where}: {tokens} tokens with its {len(each.shots)} shots, and the model "
                            f"reads {longest}; ask with fewer --shots, or leave the question out")
    flat = iter(log_likelihoods(assistant.model, list(chain.from_iterable(requests)), batch_tokens=batch_tokens))
    answers = [_answer(each, [next(flat) for _ in choices]) for each, choices in zip(asked, requests, strict=True)]
    subjects: dict[str, list[dict[str, Any]]] = {}
    for answer in answers:
        subjects.setdefault(answer["subject"], []).append(answer)
    return {"shots": len(asked[0].shots), "chat": chat, **_accuracies(answers),
            "subjects": {name: _accuracies(part) for name, part in subjects.items()}, "answers": answers}


def as_text(tokenizer: Tokenizer, asked: Asked) -> list[Request]:
    """The requests of a question, one a choice, as plain text.

    Prompt and choice are encoded together, and the choice's tokens are those after as many as the prompt alone has: a
    tokenizer may join " A" into one token, and the model has only ever read it so. What the tokenizer itself puts
    before a text is put there, nothing where it puts nothing.
    """
    begin = [tokenizer.control[tokenizer.bos]] if tokenizer.bos else []
    question, text = asked.question, asked.text()
    wholes = [f"{text} {asked.said(question, choice)}" for choice in range(len(question.choices))]
    prompt, *encoded = tokenizer.encode_batch([text, *wholes])
    return _refuse_empty(asked, [([*begin, *prompt], whole[len(prompt) :]) for whole in encoded])


def in_turns(assistant: Assistant, asked: Asked) -> list[Request]:
    """The same in turns of the chat template. The answer is encoded alone, as the model writes it."""
    renderer, question = assistant.renderer, asked.question
    prompt = renderer.prompt(asked.turns())
    said = [Turn("assistant", asked.said(question, choice)) for choice in range(len(question.choices))]
    encoded = renderer.tokenizer.encode_batch([renderer.template.content(turn) for turn in said])
    return _refuse_empty(asked, [(prompt, continuation) for continuation in encoded])


@torch.no_grad()
def log_likelihoods(model: nn.Module, requests: list[Request], *, batch_tokens: int = 8192) -> list[float]:
    """Sum of log p over the tokens of each continuation, given its prompt, in nats. Neither may be empty."""
    # The last token predicts nothing that is scored, so " A" and " B" after one prompt are the same document.
    readers: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, continuation) in enumerate(requests):
        readers.setdefault((*prompt, *continuation[:-1]), []).append(i)
    device = next(model.parameters()).device
    sums = torch.zeros(len(requests), dtype=torch.float64, device=device)
    with tqdm(total=len(readers), desc="choices", unit=" documents", disable=None) as bar:
        for batch in _batches(list(readers), batch_tokens):
            at: list[int] = []
            targets: list[int] = []
            request: list[int] = []
            end = 0
            for document in batch:
                end += len(document)
                for i in readers[document]:
                    continuation = requests[i][1]
                    at += range(end - len(continuation), end)
                    targets += continuation
                    request += [i] * len(continuation)
            documents = Documents.of_lengths(tuple(map(len, batch)), device=device)
            tokens = torch.tensor(list(chain.from_iterable(batch)), device=device)
            rows, words = torch.tensor(at, device=device), torch.tensor(targets, device=device)

            def read(hidden: Tensor, head: Tensor, rows: Tensor = rows, words: Tensor = words) -> Tensor:
                return _log_p(hidden[rows], head, words)

            sums.index_add_(0, torch.tensor(request, device=device), model(tokens, documents, read).double())
            bar.update(len(batch))
    if not sums.isfinite().all():
        raise UserError("the model's log-likelihoods are not finite; its weights are broken, or --precision bf16 "
                        "is too coarse for them")
    return sums.tolist()


def _log_p(hidden: Tensor, head: Tensor, words: Tensor) -> Tensor:
    """(n, D), (V, D), (n,) -> (n,) log p(word)"""
    rows = max(LOGITS // len(head), 1)
    parts = [logits(x, head).log_softmax(dim=-1).gather(-1, word[:, None]).squeeze(1)
             for x, word in zip(hidden.split(rows), words.split(rows), strict=True)]
    return torch.cat(parts)


def _batches(documents: list[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Documents in their order, of `batch_tokens` together; a longer one is alone."""
    batch: list[tuple[int, ...]] = []
    for document in documents:
        if batch and sum(map(len, batch)) + len(document) > batch_tokens:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def _refuse_empty(asked: Asked, requests: list[Request]) -> list[Request]:
    for choice, (_, continuation) in enumerate(requests):
        if not continuation:
            raise UserError(f"{asked.question.where}: choice {LETTERS[choice]} has no token of its own after the "
                            "prompt; try the other --style")
    return requests


def _answer(asked: Asked, sums: list[float]) -> dict[str, Any]:
    """What the model took for the answer, by each score. The first of equals wins, as in lm-evaluation-harness."""
    question = asked.question
    said = [asked.said(question, choice) for choice in range(len(question.choices))]
    lengths = [[1] * len(said), [len(text) for text in said], [len(text.encode()) for text in said]]
    chosen = {}
    for score, length in zip(SCORES, lengths, strict=True):
        normalised = [total / divisor for total, divisor in zip(sums, length, strict=True)]
        chosen[score] = normalised.index(max(normalised))
    return {"source": question.source, "line": question.line, "subject": question.subject, "style": asked.style,
            "answer": question.answer, "chosen": chosen, "log_likelihoods": sums}


def _accuracies(answers: list[dict[str, Any]]) -> dict[str, Any]:
    count = len(answers)
    chance = sum(1 / len(each["log_likelihoods"]) for each in answers) / count
    found: dict[str, Any] = {"questions": count, "chance": chance}
    for score in SCORES:
        hits = sum(each["chosen"][score] == each["answer"] for each in answers)
        found |= {score: hits / count, f"{score}_interval": list(wilson(hits, count))}
    return found


def describe(found: dict[str, Any]) -> str:
    """The table of `figures`."""
    rows = [*found["subjects"].items(), ("all", found)] if len(found["subjects"]) > 1 else [("all", found)]
    wide = max(len(name) for name, _ in rows)
    asked = f"{found['shots']} shots{', chat' if found['chat'] else ''}"
    lines = [f"multiple choice, {asked}; accuracy in % and its 95% interval",
             f"{'':{wide}}  questions  chance  " + "  ".join(f"{score:>18}" for score in SCORES)]
    for name, row in rows:
        cells = []
        for score in SCORES:
            low, high = row[f"{score}_interval"]
            cells.append(f"{100 * row[score]:5.1f} ({100 * low:.1f}-{100 * high:.1f})".rjust(18))
        lines.append(f"{name:{wide}}  {row['questions']:9,}  {100 * row['chance']:6.1f}  " + "  ".join(cells))
    return "\n".join(printable(line, PATH) for line in lines)
