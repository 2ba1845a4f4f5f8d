"""Every command of `minisft` with its options, as data: `minisft --help` waits for no other module.

`run` in cli/NAME_command.py is what command NAME does; it is imported when it is called. Commands of RECIPES take every
key of a recipe as an option, too.
"""

import argparse
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from minisft.config import FORMATS, DataConfig
from minisft.errors import printable
from minisft.planning import UTILISATION, UTILISATION_ALONE

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
MOST = 10**15  # of anything; what is counted in memory or loops has a lower bound of its own
Number = TypeVar("Number", int, float)
Option = tuple[tuple[str, ...], dict[str, Any]]  # arguments of argparse's add_argument
Command = tuple[dict[str, Any], tuple[Option | str, ...]]  # arguments of add_parser, and the options


class _Once(argparse._StoreAction):
    """An option with values. Given twice, it would drop the first ones, so it is refused, as a recipe's key is."""
    given = False

    def __call__(self, *args: Any, **named: Any) -> None:
        if self.given:
            raise argparse.ArgumentError(self, "given twice; give it once, before all its values")
        self.given = True
        super().__call__(*args, **named)


def number(kind: Callable[[str], Number], low: float, high: float, what: str) -> Callable[[str], Number]:
    """A type for argparse: text -> a number from `low` to `high`; `what` describes it in the error."""
    def read(text: str) -> Number:
        with suppress(ValueError):
            if low <= (found := kind(text)) <= high:  # false for nan
                return found
        raise argparse.ArgumentTypeError(f"{printable(text)} was given; it must be {what}")

    return read


def _tokens(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,16}(?:\.[0-9]{1,16})?)([KMB]?)", text.upper())
    return round(float(found[1]) * UNITS[found[2]]) if found else -1


natural = number(int, 0, MOST, "a whole number from 0 to 10^15")
FILE = {"type": Path, "metavar": "FILE"}
FILES = {"nargs": "+", "default": [], "metavar": "FILE"}
WHOLE = {"type": number(int, -MOST, MOST, "a whole number"), "metavar": "N"}
POSITIVE = {"type": number(int, 1, MOST, "a whole number from 1 to 10^15"), "metavar": "N"}
TOKENS = {"type": number(_tokens, 1, MOST, "a number from 1, such as 500, 50K, 1.5M or 2B"), "metavar": "N"}


def option(*names: str, **settings: Any) -> Option:
    """An option or a positional argument."""
    return names, settings


def flag(name: str, help: str) -> Option:
    """An option without a value."""
    return option(name, action="store_true", help=help)


def model_options(max_new_tokens: int, auto: str = "bf16 on a GPU, else fp32") -> tuple[Option, ...]:
    """The options of commands in which a model answers; `auto` describes the default precision."""
    return (option("--template", default="", metavar="NAME", help="chat template (the model folder's)"),
            option("--templates", default="", metavar="FILE", help="TOML file with your own templates"),
            option("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                   help=f"of weights and products; auto: {auto} (auto)"),
            option("--max-new-tokens", **POSITIVE | {"default": max_new_tokens},
                   help=f"longest answer, in tokens ({max_new_tokens})"))


def command(help: str, usage: str | None, epilog: str | None, *options: Option | str) -> Command:
    """A command; a string among its options is the title of a group of those that follow."""
    return {"help": help, "usage": usage, "epilog": epilog}, options


def recipe_command(name: str, help: str, usage: str, *options: Option) -> Command:
    """A command that reads a recipe."""
    return command(help, f"minisft {name} RECIPE [--section.key value ...] {usage}",
                   "Every key of a recipe is an option too, such as --data.train a.jsonl; `minisft train --help` "
                   "lists them all.", *options)


JSON = option("--json", **FILE, help="write every figure as JSON")
MODEL = option("model", metavar="MODEL", help="a Hugging Face folder, such as runs/my/final")
ANSWER_OPTIONS = (
    option("--limit", **POSITIVE, help="only the first N questions"),
    option("--batch", **POSITIVE, default=8, help="questions side by side (8)"), JSON, *model_options(1024))
RECIPES = ("prepare", "show", "plan")
COMMANDS = {
    "train": command(  # cli/train_command.py reads the arguments itself
        "train, as a recipe says; without arguments, the demo", "minisft train [RECIPE] [--section.key value ...]",
        None),
    "prepare": recipe_command(
        "prepare", "read, render and pack the data of a recipe, and report", "[--dump FILE] [--json FILE] [--verify]",
        option("--dump", **FILE, help="write each document's token ids and mask, one JSON object per line"),
        option("--json", **FILE, help="write the whole report as JSON"),
        flag("--verify", "check everything in the cache against its digests, and rebuild what is damaged")),
    "show": recipe_command(
        "show", "show documents as the model sees them: every token, and which are trained", "[options]",
        option("--index", **WHOLE, help="document N, from 0"),
        flag("--longest", "the longest document"),
        option("--random", type=natural, nargs="?", const=0, metavar="SEED", help="a few random documents"),
        option("--source", metavar="NAME", help="only documents from one source of data.train or data.eval"),
        option("--pack", **WHOLE, help="pack N, from 0, of the first epoch or of --step"),
        option("--step", **WHOLE, help="the packs of step N, from 1 as in metrics.jsonl"),
        flag("--ids", "one token per line, with its position and id"),
        option("--html", **FILE, help="write a page that shows a whole pack")),
    "plan": recipe_command(
        "plan", "memory, time and cost of a run, before you pay for it", "[options]",
        option("--gpus", **POSITIVE, default=8, help="GPUs, over all hosts (8)"),
        option("--gpu", metavar="NAME", help="kind of GPU: h100, \"RTX 4090\", or as nvidia-smi calls it (h100)"),
        option("--gpu-memory", type=number(float, 1, 10**4, "a number of GiB from 1 to 10,000"), metavar="GIB",
               help="memory of a GPU; with --tflops and without --gpu, a card that is not listed"),
        option("--tflops", type=number(float, 1, 10**5, "a number from 1 to 100,000"), metavar="N",
               help="its peak in dense bf16 products with fp32 sums (data sheets may print twice this: sparse)"),
        option("--hours-price", type=number(float, 0, 1e6, "a number of dollars from 0 to a million"), metavar="USD",
               help="price of one GPU for an hour"),
        option("--tokens", **TOKENS, help="tokens of the data, such as 50M, instead of reading it"),
        option("--document-length", **TOKENS, help="with --tokens: tokens of a document (data.seq_len)"),
        option("--utilisation", type=number(float, 1e-6, 1, "a number above 0, up to 1"),
               metavar="SHARE", help="share of peak FLOPs to assume, recomputation included "
                                     f"({UTILISATION}; one GPU: {UTILISATION_ALONE})"), JSON),
    "chat": command(
        "talk to a model, or ask it one question", "minisft chat MODEL [--prompt TEXT] [options]", None,
        option("model", metavar="MODEL", help="Hugging Face folder, such as runs/my/final"),
        option("--prompt", metavar="TEXT", help="answer this and end; - reads it from standard input"),
        option("--system", default="", metavar="TEXT", help="system text of the conversation"),
        option("--temperature", type=float, default=0.0, metavar="T", help="0: always the most probable token (0)"),
        option("--top-p", type=float, default=1.0, metavar="P",
               help="draw from the fewest tokens that together are as likely as P (1: all)"),
        option("--top-k", type=natural, default=0, metavar="K", help="draw from the K likeliest tokens (0: all)"),
        option("--repetition-penalty", type=float, default=1.0, metavar="R",
               help="above 1: tokens that occurred before become less likely (1)"),
        option("--seed", type=natural, default=0, help="of the draws (0)"),
        *model_options(512, "bf16 on a GPU and on a CPU that multiplies in it, else fp32")),
    "eval": command(
        "what a model knows and does, in figures", None, None, MODEL,
        option("--batch-tokens", **POSITIVE, default=8192, help="tokens in one forward pass (8192)"),
        option("--limit", **POSITIVE, help="only the first N questions of each file"), JSON, *model_options(512),
        "multiple choice by log-likelihood",
        option("--choices", **FILES, help="questions: MMLU's CSV, TurkishMMLU's JSON, ARC's JSON"),
        option("--format", choices=("auto", "mmlu", "turkish_mmlu", "arc"), default="auto",
               help="of the files of questions (auto)"),
        option("--language", choices=("en", "tr"), default="", help="of the prompt's own words (the format's)"),
        option("--style", choices=("letter", "text"),
               help="score the letter of a choice, or its text (text for arc, letter for the others)"),
        option("--shots", type=natural, default=0, metavar="K", help="answered questions before each (0)"),
        option("--shots-from", **FILES, help="files they come from (the other questions of the same subject)"),
        flag("--chat", "ask in a user's turn of the chat template"),
        "instructions that a program can check",
        option("--instructions", metavar="FILE",
               help="prompts in IFEval's layout, or `instructions`: the shipped ones, English and Turkish"),
        flag("--skip-unknown", "leave out instructions that have no check"),
        "held-out losses",
        option("--data", "--data.train", **FILES,
               help="conversations, whose answers count, and plain text, in which every token counts"),
        option("--data-format", "--data.format", dest="data.format", choices=FORMATS, default="auto",
               help="layout of these files (auto)"),
        option("--seq-len", "--data.seq_len", dest="data.seq_len", **POSITIVE, default=2048,
               help="longer documents are left out, and counted (2048, or the model's context if that is less)"),
        *(option(f"--data.{name}", metavar="X", help=DataConfig.__dataclass_fields__[name].metadata["doc"])
          for name in ("fields", "ignore", "skip_bad", "max_bad", "oasst", "overlong", "dedup"))),
    "answer": command(
        "answer a file of questions for a judge, and count words, repetitions and praise",
        "minisft answer MODEL --questions FILE --out FILE [options]",
        "An interrupted command resumes if you repeat it; with nothing left to answer it only prints the signals.",
        MODEL,
        option("--questions", required=True, metavar="FILE",
               help="mt-en or mt-tr (shipped), or a file in FastChat's or IFEval's layout"),
        option("--out", required=True, **FILE, help="the answers, in FastChat's layout"),
        option("--model-id", default="", metavar="NAME", help="the model's name in the file (its folder's)"),
        flag("--flips", "also the flip test: does doubt change an answer?"), *ANSWER_OPTIONS),
    "compare": command(
        "a page for blind ratings of two models; win rates of ratings or of a judge",
        "minisft compare A B --questions FILE --out PAGE.html [options]\n"
        "       minisft compare --ratings FILE ... --key PAGE.html.key.json\n"
        "       minisft compare --judge FILE",
        "Give the page to the rater and keep the key, which says whose answers are where.",
        option("models", nargs="*", metavar="A B", help="model folders, or files that `minisft answer` wrote"),
        option("--questions", metavar="FILE",
               help="mt-en or mt-tr (shipped), or a file in FastChat's or IFEval's layout"),
        option("--out", **FILE, help="the page; its key and the answers of model folders are written beside it"),
        option("--seed", type=natural, metavar="N", default=0, help="of the hidden order (0)"),
        option("--ratings", **FILES, type=Path, help="saved by the page"),
        option("--key", **FILES, type=Path, help="of the rated pages"),
        option("--judge", **FILE, help="verdicts in FastChat's layout, of pairs or scores"), *ANSWER_OPTIONS),
    "report": command(
        "a page of a run's curves, throughput, data and answers; compares several runs",
        "minisft report RUN [RUN ...] [--out FILE | --tensorboard FOLDER [--follow]]", None,
        option("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run (run.dir)"),
        option("--out", **FILE, help="the page (report.html in the first run's folder)"),
        option("--tensorboard", type=Path, metavar="FOLDER",
               help="write event files instead, into a folder for each run"),
        option("--follow", nargs="?", type=number(float, 0.1, 3600, "a number of seconds from 0.1 to 3600"), const=5.0,
               metavar="SECONDS", help="go on writing what is new, every 5 seconds, until the runs have ended")),
    "recipes": command(
        "the recipes that come with minisft, or the text of one", "minisft recipes [NAME]",
        "`minisft recipes NAME > my.toml` copies a recipe, for you to change.",
        option("name", nargs="?", metavar="NAME", help="print this recipe")),
    "convert": command(
        "a model in another form: an adapter merged, Meta's files as Hugging Face's, another precision",
        "minisft convert SOURCE TARGET [--merge] [--base FOLDER] [--format hf|meta] [--dtype bf16|fp32]",
        "SOURCE is a Hugging Face folder, one of Meta's with --format meta, or an adapter in PEFT's format with "
        "--merge. TARGET must not exist, or be empty; it becomes a Hugging Face folder.",
        option("source", type=Path), option("target", type=Path),
        flag("--merge", "SOURCE is an adapter: add it to its base model"),
        option("--base", type=Path, metavar="FOLDER", help="the base model (the one that the adapter names)"),
        option("--format", choices=("hf", "meta"), default="hf",
               help="layout of the model that is read (hf); meta: consolidated.*.pth"),
        option("--dtype", choices=("bf16", "fp32"), default="bf16", help="precision of TARGET (bf16)")),
}


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Every command, for argparse."""
    for name, (texts, options) in COMMANDS.items():
        place: Any = (parser := commands.add_parser(name, allow_abbrev=False, **texts))
        parser.register("action", None, _Once)
        for each in options:
            if isinstance(each, str):
                place = parser.add_argument_group(each)
            else:
                place.add_argument(*each[0], **each[1])
