"""The training loop, top to bottom.

    configuration -> data and plan -> model, sharded -> for each step of the plan:
        forward and backward of each micro-batch, the loss divided by the trained tokens of the whole step
        clip by the global norm, set the learning rate, step
    -> held-out losses -> a Hugging Face folder
"""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minisft import config as configuration
from minisft.config import Config
from minisft.data.loader import MicroBatch, steps
from minisft.errors import EXIT_IO, EXIT_NUMERICS, EXIT_USAGE, NumericsError, UserError
from minisft.evaluation.heldout import heldout_loss
from minisft.model import weights
from minisft.model.attention import Documents
from minisft.model.config import PRESETS, LlamaConfig, read_config
from minisft.model.llama import Llama
from minisft.model.meta import MetaFolder
from minisft.preparation import Prepared, describe, prepare
from minisft.training import parallel
from minisft.training.export import export
from minisft.training.loss import linear_cross_entropy
from minisft.training.metrics import MetricsLog, memory_gib, write_status
from minisft.training.optimizer import Optimizer, learning_rate
from minisft.training.parallel import World


def main(argv: list[str]) -> int:
    """Train as the command line says; returns the exit code. Errors a person can mend are one message, once."""
    try:
        train(configuration.load(argv))
        return 0
    except (UserError, NumericsError, OSError) as error:
        return report_error(error)


def report_error(error: Exception) -> int:
    """Print what went wrong, once however many processes run; returns the exit code."""
    if parallel.launched_rank()[0] == 0:
        print(f"error: {error}", file=sys.stderr)
    return exit_code(error)


def exit_code(error: Exception) -> int:
    """2 for what the user can mend, 3 for numerics, 4 for input and output, 1 for a bug."""
    kinds = {UserError: EXIT_USAGE, NumericsError: EXIT_NUMERICS, OSError: EXIT_IO}
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), 1)


def train(config: Config) -> None:
    """One run, from the data to `final/` in the run folder."""
    leads = parallel.launched_rank()[0] == 0
    folder = Path(config.run.dir)
    if (folder / "final").exists():
        raise UserError(f"{folder}: holds a finished run; choose another folder with run.dir, or delete it")
    parallel.check_split(config.batch.packs, shard=config.parallel.shard, replicate=config.parallel.replicate)
    prepared = prepare(config, quiet=not leads)
    model_config, checkpoint = open_model(config, prepared)
    if leads:
        print(describe(prepared), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        write_status(folder, state="running")
    world = parallel.start(replicate=config.parallel.replicate)
    try:
        model = parallel.build_model(model_config, world, precision=config.train.precision,
                                     recompute=config.parallel.activation_checkpointing == "full")
        if checkpoint:
            weights.load(model, checkpoint)
        else:
            weights.initialize(model, std=model_config.initializer_range, seed=config.train.seed)
        run_steps(config, prepared, model, world)
        export(model, model_config, prepared.renderer, folder / "final", leads=leads,
               dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
        if leads:
            write_status(folder, state="done", step=prepared.plan.total_steps, exit_code=0)
    except Exception as error:
        if leads:
            write_status(folder, state="failed", exit_code=exit_code(error), error=str(error))
        raise
    finally:
        parallel.stop()


def open_model(config: Config, prepared: Prepared) -> tuple[LlamaConfig, weights.Checkpoint | None]:
    """The network's shape and its weights on disk (None: random), checked against each other and the data."""
    if config.model.init == "random":
        checkpoint = None
        model_config = PRESETS.get(config.model.config) or read_config(config.model.config)
    else:
        is_meta = config.model.format == "meta"
        checkpoint = MetaFolder(config.model.path) if is_meta else weights.SafetensorsFolder(config.model.path)
        model_config = checkpoint.config if is_meta else read_config(config.model.path)
        with torch.device("meta"):
            weights.check(Llama(model_config), checkpoint)
    for dataset in (prepared.train, *prepared.evals.values()):
        for report in dataset.reports:
            if report.largest_id >= model_config.vocab_size:
                raise UserError(f"{report.path}: token id {report.largest_id} is past the model's vocabulary of "
                                f"{model_config.vocab_size}; {prepared.tokenizer.file} belongs to another model")
    return model_config, checkpoint


def run_steps(config: Config, prepared: Prepared, model: nn.Module, world: World) -> None:
    """Every step of the plan, with its evaluations."""
    plan, optim = prepared.plan, config.optim
    optimizer = Optimizer(model, world.mesh, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps)
    log = MetricsLog(Path(config.run.dir) / "metrics.jsonl") if world.leads else None
    bar = tqdm(total=plan.total_steps, desc="train", unit=" steps", disable=not world.leads)
    evaluate(config, prepared, model, world, log, step=0)
    started = time.perf_counter()
    for step in steps(prepared.train, plan, rank=world.rank, ranks=world.ranks, micro_packs=config.batch.micro_packs):
        loss = torch.zeros((), device=world.device)
        for batch in step.micro_batches:
            micro_loss = forward(model, batch, step.target_tokens, config, world)
            micro_loss.backward()
            loss += micro_loss.detach()
        grad_norm = optimizer.clip(optim.clip_norm)
        lr = learning_rate(step.index, total_steps=plan.total_steps, peak=optim.lr, schedule=optim.schedule,
                           warmup_steps=optim.warmup_steps, min_ratio=optim.min_lr_ratio,
                           decay_fraction=optim.decay_fraction)
        optimizer.step(lr)
        parallel.all_sum(loss)

        number = step.index + 1
        if log:
            seconds, started = time.perf_counter() - started, time.perf_counter()
            done = log.write({"kind": "train", "step": number, "epoch": step.epoch, "loss": loss, "lr": lr,
                              "grad_norm": grad_norm, "tokens": step.tokens, "target_tokens": step.target_tokens,
                              "seconds": seconds, "tokens_per_second": step.tokens / seconds,
                              "memory_gib": memory_gib(world.device)})
            if done and done["kind"] == "train":
                bar.set_postfix(loss=f"{done['loss']:.4f}", tokens_per_second=f"{done['tokens_per_second']:,.0f}")
            bar.update()
        if number == plan.total_steps or (config.eval.every and number % config.eval.every == 0):
            evaluate(config, prepared, model, world, log, step=number)
            started = time.perf_counter()
    bar.close()
    if log:
        log.close()


def forward(model: nn.Module, batch: MicroBatch, step_target_tokens: int, config: Config, world: World) -> Tensor:
    """This micro-batch's part of the step's loss: its sum over the trained tokens of the whole step."""
    targets, target_at = batch.targets.to(world.device), batch.target_at.to(world.device)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return linear_cross_entropy(hidden[target_at], head, targets, denominator=step_target_tokens,
                                    label_smoothing=config.optim.label_smoothing, z_loss=config.optim.z_loss)

    return model(batch.tokens.to(world.device), Documents.of_lengths(batch.lengths, device=world.device), loss)


def evaluate(config: Config, prepared: Prepared, model: nn.Module, world: World, log: MetricsLog | None, *,
             step: int) -> None:
    """The held-out loss of each data.eval source, into the log."""
    for name, dataset in prepared.evals.items():
        loss = heldout_loss(model, dataset, world, seq_len=config.data.seq_len, micro_packs=config.batch.micro_packs)
        if log:
            log.write({"kind": "eval", "step": step, "name": name, "loss": loss,
                       "target_tokens": int(dataset.targets.sum())})
            tqdm.write(f"step {step}: held-out loss on {name}: {loss:.4f}", file=sys.stderr)
