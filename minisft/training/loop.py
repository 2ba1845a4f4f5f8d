"""THE training loop: a generator that takes a step at a time, and neither reads, writes nor prints.

    for each step of the plan:
        forward and backward of each micro-batch, its loss divided by the trained tokens of the whole step
        clip by the global norm, update
        yield what happened               -> run_steps in runs/lifecycle.py: log, save, evaluate, stop at SIGTERM

It never waits for the device, except with `parallel.offload`.
"""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisft.config import Config
from minisft.data.batches import Step, TokenDocuments, steps
from minisft.data.packing import Plan
from minisft.training.loss import batch_loss
from minisft.training.optimizer import AdamW, learning_rate
from minisft.training.parallel import World, all_sum, is_compiled


@dataclass(frozen=True)
class StepResult:
    """One finished optimizer step. The tensors are on the device and may still be on their way."""

    step: int  # from 1
    epoch: int  # from 0
    lr: float
    tokens: int  # of all ranks
    target_tokens: int  # of all ranks
    target_weight: float | None  # the sum of their weights in the loss; None if the data has no weights
    loss: Tensor  # () weighted mean over the step's trained tokens, in nats, label smoothing and z-loss included
    grad_norm: Tensor  # () before clipping; if it is not finite, AdamW skipped the step


def training_steps(model: nn.Module, optimizer: AdamW, dataset: TokenDocuments, plan: Plan, config: Config,
                   world: World, *, start: int = 0) -> Generator[StepResult, None, None]:
    """Train `model` on the steps of `plan` from `start` (from 0) on, yielding after each. All ranks run it together."""
    compiled = is_compiled(config.parallel, world.device)
    with closing(planned_steps(dataset, plan, config, world, start=start)) as planned:
        for step in planned:
            lr = learning_rate(step.index, plan.total_steps, config.optim)
            optimizer.begin(lr, step.index)
            loss_sum = torch.zeros((), device=world.device)
            for batch in step.micro_batches:
                loss = batch_loss(model, batch, world.device, step.denominator, config.optim, compiled=compiled)
                # Adds to .grad: sums over micro-batches and, in FSDP, over ranks; never means. FSDP sums after each
                # micro-batch: kept until the last one, gradients would be whole and in fp32 on every rank.
                loss.backward()
                loss_sum += loss.detach()
            grad_norm = optimizer.clip(config.optim.clip_norm)  # 0: only measures
            optimizer.step()  # and drops the gradients
            all_sum(loss_sum)  # each rank has had only its own micro-batches
            yield StepResult(step.index + 1, step.epoch, lr, step.tokens, step.target_tokens, step.target_weight,
                             loss_sum, grad_norm)


def planned_steps(dataset: TokenDocuments, plan: Plan, config: Config, world: World, *,
                  start: int = 0) -> Generator[Step, None, None]:
    """This rank's share of the steps of `plan` from `start` (from 0) on. Close it if you leave it early."""
    return steps(dataset, plan, start=start, rank=world.rank, ranks=world.ranks, context=world.context,
                 device=world.device, micro_packs=config.batch.micro_packs,
                 fixed=is_compiled(config.parallel, world.device))
