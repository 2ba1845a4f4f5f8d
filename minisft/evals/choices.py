"""Multiple choice by log-likelihood: which choice does the model find most probable after the question?

    letter   The following are multiple choice questions (with answers) about astronomy.
             (blank line)
             How many moons has Mars?
             A. one
             B. two
             Answer:                            scored: " A", " B"

    text     Question: How many moons has Mars?
             Answer:                            scored: " one", " two"

A choice scores log p(its tokens | prompt), summed; `acc` takes the best sum. Long texts are less probable than short
ones whatever they say, so `acc_norm` first divides by the choice's characters, and `acc_bytes` by its bytes. Prompts,
tokens and figures are those of lm-evaluation-harness (Gao et al. 2021): `letter` is its mmlu and turkishmmlu, `text`
its arc_easy. Prompts and choices are documents in a stream; only hidden states that predict a choice reach the head.
"""

# T tokens in the stream, D model width, V vocabulary; n tokens that are scored

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minisft.data.conversation import Turn
from minisft.errors import PATH, UserError, printable
from minisft.evals.questions import LETTERS, ChoiceQuestion, read
from minisft.evals.rates import rate
from minisft.generate.assistant import Assistant
from minisft.generate.decoding import logits
from minisft.model.llama import Documents

STYLES = ("letter", "text")
WORDS = {"en": ("Question:", "Answer:"), "tr": ("Soru:", "Cevap:")}
LOGITS = 2**24  # at most so many exist at one time
SCORES: dict[str, Callable[[str], int]] = {  # what a sum is divided by
    "acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}

Request = tuple[list[int], list[int]]  # token ids of a prompt, and of a choice that may follow it


@dataclass(frozen=True, slots=True)
class ChoicePrompt:
    """A question as the model reads it, after `shots` that are solved."""

    question: ChoiceQuestion
    style: str
    shots: tuple[ChoiceQuestion, ...] = ()

    def opening(self) -> str:
        """The first line of MMLU."""
        question = self.question
        if self.style == "text" or question.format != "mmlu" or question.language != "en":
            return ""
        return f"The following are multiple choice questions (with answers) about {question.subject}.\n\n"

    def ask(self, question: ChoiceQuestion) -> str:
        """A question, up to the word that its answer follows."""
        asks, answers = WORDS[self.question.language]
        text = question.text.strip()
        if self.style == "text":
            return f"{asks} {text}\n{answers}"
        choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
        return "\n".join([text if self.opening() else f"{asks} {text}", *choices, answers])

    def choices(self, question: ChoiceQuestion) -> tuple[str, ...]:
        """The choices as they are scored: their letters or their texts."""
        return tuple(LETTERS[: len(question.choices)]) if self.style == "letter" else question.choices

    def text(self) -> str:
        """The prompt as plain text."""
        *solved, asked = (turn.content for turn in self.turns())
        return "".join(f"{ask} {answer}\n\n" for ask, answer in zip(solved[::2], solved[1::2], strict=True)) + asked

    def turns(self) -> tuple[Turn, ...]:
        """The prompt as turns of a chat; the opening is part of the first."""
        solved = [text for shot in self.shots for text in (self.ask(shot), self.choices(shot)[shot.answer])]
        first, *rest = *solved, self.ask(self.question)
        return tuple(map(Turn, cycle(("user", "assistant")), (self.opening() + first, *rest)))


def load(files: list[str], *, format: str = "auto", language: str = "", style: str | None = None, shots: int = 0,
         shots_from: Iterable[str] = (), limit: int | None = None) -> list[ChoicePrompt]:
    """Prompts for the (first `limit`) questions of each file, each after `shots` solved questions.

    Shots are the first questions of the same subject in `shots_from`, or of any subject if it has none of those asked;
    without `shots_from` they come from `files`. A question is never its own shot.
    """
    sets = [read(file, format=format, language=language) for file in files]
    pool = [q for file in shots_from for q in read(file, format=format, language=language)]
    pool = pool or list(chain.from_iterable(sets))
    questions = [question for found in sets for question in found[:limit]]
    by_subject = bool({q.subject for q in pool} & {q.subject for q in questions})
    prompts = []
    for question in questions:
        others = (q for q in pool if (q.text.strip(), q.choices) != (question.text.strip(), question.choices)
                  and (q.subject == question.subject or not by_subject))
        chosen = tuple(islice(others, shots))
        if len(chosen) < shots:
            raise UserError(f"{question.where}: --shots {shots}, but there are {len(chosen)} other questions about "
                            f"{printable(repr(question.subject))}; ask for fewer, or name files that have them with "
                            "--shots-from")
        prompts.append(ChoicePrompt(question, style or ("text" if question.format == "arc" else "letter"), chosen))
    return prompts


def figures(assistant: Assistant, prompts: list[ChoicePrompt], *, chat: bool = False,
            batch_tokens: int = 8192) -> dict[str, Any]:
    """Accuracies with 95% intervals, over all questions and by subject, and the log-likelihoods of every choice."""
    requests = [encode(assistant, prompt, chat=chat) for prompt in prompts]
    longest = assistant.model.config.max_position_embeddings
    for prompt, choices in zip(prompts, requests, strict=True):
        tokens = max(len(start) + len(continuation) - 1 for start, continuation in choices)
        if tokens > longest:
            raise UserError(f"{prompt.question.where}: {tokens} tokens with its {len(prompt.shots)} shots, but the "
                            f"model reads {longest}; ask with fewer --shots, or leave the question out")
    flat = iter(log_likelihoods(assistant.model, list(chain.from_iterable(requests)), batch_tokens=batch_tokens))
    answers = [_answer(prompt, list(islice(flat, len(prompt.question.choices)))) for prompt in prompts]
    subjects = dict.fromkeys(answer["subject"] for answer in answers)
    asked, first = [prompt.question for prompt in prompts], dict[tuple[str, ...], ChoiceQuestion]()
    repeated = [f"{question.where} is {same.where}" for question in asked
                if (same := first.setdefault((question.text.strip(), *question.choices), question)) is not question]
    return {"formats": sorted({f"{question.format} in {question.language}" for question in asked}),
            "repeated": repeated, "shots": len(prompts[0].shots), "chat": chat, **_accuracies(answers),
            "subjects": {name: _accuracies([each for each in answers if each["subject"] == name]) for name in subjects},
            "answers": answers}


def encode(assistant: Assistant, prompt: ChoicePrompt, *, chat: bool) -> list[Request]:
    """The requests of a question, one for each choice, in turns of the chat template or as plain text.

    In turns, a choice is encoded alone, as the model writes it. As text, prompt and choice are encoded together, and
    the choice's tokens are those after as many as the prompt alone has: a tokenizer may join " A" into one token, which
    the model has always read so. What the tokenizer itself puts before a text, if anything, comes first.
    """
    renderer, tokenizer, choices = assistant.renderer, assistant.renderer.tokenizer, prompt.choices(prompt.question)
    if chat:
        start = renderer.prompt(prompt.turns())
        continuations = tokenizer.encode_batch([renderer.template.content(Turn("assistant", text)) for text in choices])
    else:
        text = prompt.text()
        plain, *wholes = tokenizer.encode_batch([text, *(f"{text} {choice}" for choice in choices)])
        start = [tokenizer.control[tokenizer.bos], *plain] if tokenizer.bos else plain
        continuations = [whole[len(plain) :] for whole in wholes]
    for letter, continuation in zip(LETTERS, continuations, strict=False):
        if not continuation:
            raise UserError(f"{prompt.question.where}: choice {letter} has no token of its own after the prompt; "
                            "try the other --style")
    return [(start, continuation) for continuation in continuations]


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
        for batch in _batches(readers, batch_tokens):
            # (row in the stream, word that it predicts, request that the word belongs to)
            scored = [(end - len(requests[i][1]) + k, word, i)
                      for document, end in zip(batch, accumulate(map(len, batch)), strict=True)
                      for i in readers[document] for k, word in enumerate(requests[i][1])]
            rows, words, owners = torch.tensor(list(zip(*scored, strict=True)), device=device)
            documents = Documents.of_lengths(tuple(map(len, batch)), device=device)
            tokens = torch.tensor(list(chain.from_iterable(batch)), device=device)
            sums.index_add_(0, owners, model(tokens, documents, partial(_log_p, rows=rows, words=words)).double())
            bar.update(len(batch))
    if not sums.isfinite().all():
        raise UserError("the model's log-likelihoods are not finite: its weights are broken, or --precision bf16 "
                        "is too coarse for them; use --precision fp32")
    return sums.tolist()


def _log_p(hidden: Tensor, head: Tensor, *, rows: Tensor, words: Tensor) -> Tensor:
    """(T, D), (V, D), (n,), (n,) -> (n,) log p(word) after each row"""
    size = max(LOGITS // len(head), 1)
    parts = [logits(x, head).log_softmax(dim=-1).gather(-1, word[:, None]).squeeze(1)
             for x, word in zip(hidden[rows].split(size), words.split(size), strict=True)]
    return torch.cat(parts)


def _batches(documents: Iterable[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Documents in their order, up to `batch_tokens` together; a longer one is alone."""
    batch: list[tuple[int, ...]] = []
    for document in documents:
        if batch and sum(map(len, batch)) + len(document) > batch_tokens:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def _answer(prompt: ChoicePrompt, sums: list[float]) -> dict[str, Any]:
    """The model's choice by each score. The first of equals wins, as in lm-evaluation-harness."""
    question, texts = prompt.question, prompt.choices(prompt.question)
    chosen = {}
    for score, length in SCORES.items():
        normalized = [total / length(text) for total, text in zip(sums, texts, strict=True)]
        chosen[score] = normalized.index(max(normalized))
    return {"source": question.source, "line": question.line, "subject": question.subject, "style": prompt.style,
            "answer": question.answer, "chosen": chosen, "log_likelihoods": sums}


def _accuracies(answers: list[dict[str, Any]]) -> dict[str, Any]:
    chance = sum(1 / len(each["log_likelihoods"]) for each in answers) / len(answers)
    found: dict[str, Any] = {"questions": len(answers), "chance": chance}
    for score in SCORES:
        share = rate(each["chosen"][score] == each["answer"] for each in answers)
        found |= {score: share["rate"], f"{score}_interval": share["interval"]}
    return found


def describe(found: dict[str, Any]) -> str:
    """The table of `figures`."""
    rows = [*found["subjects"].items(), ("all", found)] if len(found["subjects"]) > 1 else [("all", found)]
    wide = max(len(name) for name, _ in rows)
    lines = [f"multiple choice ({', '.join(found['formats'])}), {found['shots']} shots{', chat' * found['chat']}; "
             "accuracy in % and its 95% interval",
             f"{'':{wide}}  questions  chance  " + "  ".join(f"{score:>18}" for score in SCORES)]
    for name, row in rows:
        cells = []
        for score in SCORES:
            low, high = row[f"{score}_interval"]
            cells.append(f"{100 * row[score]:5.1f} ({100 * low:.1f}-{100 * high:.1f})".rjust(18))
        lines.append(f"{name:{wide}}  {row['questions']:9,}  {100 * row['chance']:6.1f}  " + "  ".join(cells))
    if repeated := found["repeated"]:
        lines.append(f"questions that stand twice, which makes the intervals too narrow: {len(repeated):,} "
                     f"({repeated[0]}{', ...' * (len(repeated) > 1)})")
    return "\n".join(printable(line, PATH) for line in lines)
