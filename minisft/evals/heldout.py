"""A model on text that it is not trained on: its loss, what it forgets, its answers. A training run calls these.

    forgetting = loss now - loss at step 0, both on the same held-out general text, in nats a token

A network that learns a new task loses an old one if nothing holds it there (McCloskey & Cohen 1989, "Catastrophic
interference in connectionist networks"). 0 is the base model; 0.1 is a perplexity 10.5% higher. Answers tell what a
loss does not. A question is a document up to its last answer, which is the reference:

    ids      <|begin_of_text|> ... Capital of Malta? <|eot_id|> ... assistant ...  Valletta . <|eot_id|>
    trained  0 0 0 ...                                                             1        1 1
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minisft.config import DataConfig, Source
from minisft.data.batches import steps
from minisft.data.dataset import Dataset
from minisft.data.packing import Plan
from minisft.data.store import open_store
from minisft.data.tokenizer import Tokenizer
from minisft.errors import PATH, UserError, printable
from minisft.generate.assistant import Assistant
from minisft.generate.decoding import logits
from minisft.model.llama import Documents
from minisft.prepare import check_vocabulary, read_source
from minisft.training.loss import batch_loss
from minisft.training.parallel import World, all_sum

MOST = 128  # tokens of an answer: a base model seldom stops by itself
REMEDIES = "replayed general text (data.replay), a lower optim.lr, fewer steps (train.max_steps), LoRA"


@torch.no_grad()
def heldout_loss(model: nn.Module, dataset: Dataset, world: World | None = None, *, seq_len: int, micro_packs: int = 1,
                 fixed: bool = False, check: Callable[[int, int], None] = lambda done, total: None) -> float:
    """Mean loss in nats over the trained tokens of `dataset`. All ranks of `world` call it and get the same number.

    Tokens are weighted as in training, without label smoothing and z-loss: one of weight 0.5 counts half, as one of
    weight 0 does not count.

    The sum over all micro-batches and ranks is divided once, so neither packing nor the number of ranks matters. With
    `fixed`, all micro-batches have the same number of tokens, as a compiled `model` needs them. All ranks call `check`
    before each micro-batch with how many are done, and of how many; an exception from it ends the evaluation.
    """
    rank, ranks, context = (world.rank, world.ranks, world.context) if world else (0, 1, 1)
    device = world.device if world else next(model.parameters()).device
    plan = Plan(dataset.lengths, dataset.num_loss_tokens, seq_len=seq_len,
                packs_per_step=micro_packs * (ranks // context), epochs=1, shuffle=False)
    tokens = int(dataset.num_loss_tokens.sum())
    mean_weight = float(dataset.loss_weights.sum()) / tokens  # 1 without weights
    total = torch.zeros((), device=device)
    with closing(steps(dataset, plan, rank=rank, ranks=ranks, context=context, micro_packs=micro_packs,
                       fixed=fixed, device=device)) as planned:
        for done, batch in enumerate(batch for step in planned for batch in step.micro_batches):
            check(done, plan.total_steps)
            total += batch_loss(model, batch, device, mean_weight, compiled=fixed)
    return float(all_sum(total) if world else total) / tokens


def loss_figures(loss: float, target_weight: float | None = None) -> dict[str, float | None]:
    """The loss, its perplexity, exp(loss), and the sum of the weights if there are any, for a record; None if not
    finite, because JSON has no NaN."""
    figures = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    figures |= {} if target_weight is None else {"target_weight": target_weight}
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def measure_forgetting(record: dict[str, Any], before: list[dict[str, Any]], *, bound: float) -> str:
    """Put "forgetting" into an eval record of general text, given all of the run's eval records `before` it.

    Returns a warning once each time the forgetting exceeds `bound` (nats a token; 0 for none), and once if the base
    model's loss is missing. Because it needs only records, a resumed run warns as an uninterrupted one does.
    """
    name, loss, step = record["name"], record["loss"], record["step"]
    if loss is None:
        return ""
    known = [each for each in before if each["name"] == name and each["loss"] is not None]
    base = {each["step"]: each["loss"] for each in (*known, record)}.get(0)
    if base is None:
        return "" if known else f"step {step}: cannot measure forgetting on {name}: its loss at step 0 is missing"
    record["forgetting"] = rise = loss - base
    if not 0 < bound < rise or (known and known[-1]["loss"] - base > bound):
        return ""
    return (f"step {step}: the model forgets: {name} costs it {rise:.3f} nats a token more than the base model "
            f"(eval.forgetting_bound = {bound:g}). What helps: {REMEDIES}")


@dataclass(frozen=True)
class HeldoutQuestion:
    """A held-out document in two parts."""

    source: str
    prompt: list[int]
    reference: list[int]


def heldout_questions(evals: dict[str, Dataset], count: int) -> list[HeldoutQuestion]:
    """The first `count` questions of each source. Raises UserError if there are none."""
    found = [question for name, dataset in evals.items() for question in islice(_questions(name, dataset), count)]
    if not found:
        raise UserError(f"eval.samples = {count}: data.eval has no question that an answer follows, only text that is "
                        "trained on from its beginning (plain text, or data.train_on = all); set eval.samples to 0")
    return found


def _questions(name: str, dataset: Dataset) -> Iterator[HeldoutQuestion]:
    for i in range(len(dataset)):
        ids, weights = dataset.document(i)
        trained = weights > 0
        starts = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0) == 1)  # of its answers
        if len(starts) and starts[0] > 1:  # at 1 only the first token is not trained, which nothing could predict
            start = starts[-1]
            yield HeldoutQuestion(name, ids[:start].tolist(), ids[start:][trained[start:]].tolist())


def sample_answers(model: nn.Module, questions: list[HeldoutQuestion], tokenizer: Tokenizer, *, stop_ids: set[int],
                   device: torch.device, check: Callable[[int, int], None] = lambda done, total: None
                   ) -> list[dict[str, str]]:
    """{name, prompt, answer, reference} as text, decoded greedily. All ranks call it with the same questions.

    All ranks call `check` before each token with how many are done, and of how many at most; an exception from it ends
    the answers.
    """
    continued = continue_greedily(model, [question.prompt for question in questions], stop_ids=stop_ids, check=check,
                                  device=device)
    return [{"name": question.source, "prompt": tokenizer.decode(question.prompt), "answer": tokenizer.decode(ids),
             "reference": tokenizer.decode([token for token in question.reference if token not in stop_ids])}
            for question, ids in zip(questions, continued, strict=True)]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]  # each token gives growing texts a new shape
def continue_greedily(model: nn.Module, prompts: list[list[int]], *, stop_ids: set[int], device: torch.device,
                      check: Callable[[int, int], None] = lambda done, total: None) -> list[list[int]]:
    """The continuation of each prompt, without its stop token, by whole forward passes: sharded parameters are whole
    only inside `forward`, and a cache's decoder calls each layer by itself."""
    texts, growing = list(map(list, prompts)), list(range(len(prompts)))
    for done in range(MOST):
        check(done, MOST)
        documents = Documents.of_lengths(tuple(len(texts[i]) for i in growing), device=device)
        last = documents.cu_seqlens[1:].long() - 1

        def best(hidden: Tensor, head: Tensor, last: Tensor = last) -> Tensor:
            return logits(hidden[last], head).argmax(dim=-1)

        chosen = model(torch.tensor([token for i in growing for token in texts[i]], device=device), documents, best)
        dist.broadcast(chosen, 0)  # a rank that rounds differently would end earlier and leave the others waiting
        tokens = dict(zip(growing, chosen.tolist(), strict=True))
        growing = [i for i in growing if tokens[i] not in stop_ids]
        for i in growing:
            texts[i].append(tokens[i])
        if not growing:
            break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def file_losses(assistant: Assistant, files: list[str], data: DataConfig, *, quiet: bool = False
                ) -> list[dict[str, Any]]:
    """For each file: name, loss, perplexity, target_tokens, documents, and how many of those read were left out.

    Answers count in conversations, every token in plain text. `data` says how files are read; documents longer than
    its seq_len or the model's context are left out. Raises UserError for files that training would refuse.
    """
    model, found = assistant.model, []
    data = replace(data, seq_len=min(data.seq_len, model.config.max_position_embeddings))
    for file in files:
        source = Source(file, format=data.format, fields=data.fields, name=file)
        store = open_store(source, data, assistant.renderer, read_source, quiet=quiet)
        dataset = Dataset([store], data)
        check_vocabulary([dataset], model.config, assistant.renderer.tokenizer)
        report = dataset.reports[0]
        loss = heldout_loss(model, dataset, seq_len=data.seq_len)
        found.append({"name": file, **loss_figures(loss, dataset.target_weight),
                      "target_tokens": report.target_tokens, "documents": report.kept,
                      "left_out": report.read - report.kept})
    return found


def describe(found: list[dict[str, Any]]) -> str:
    """A table of `file_losses`."""
    lines = [f"{'loss':>8}{'perplexity':>12}{'tokens':>12}{'documents':>11}{'left out':>10}  held-out file"]
    for each in found:
        loss, perplexity = ("-" if each[name] is None else f"{each[name]:,.4f}" for name in ("loss", "perplexity"))
        lines.append(f"{loss:>8}{perplexity:>12}{each['target_tokens']:>12,}{each['documents']:>11,}"
                     f"{each['left_out']:>10,}  {each['name']}")
    return "\n".join(printable(line, PATH) for line in lines)
