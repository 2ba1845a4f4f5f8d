"""`minisft eval`: what a model knows and does, in figures.

The option that names its files asks for an evaluation. Each is a module of the package with two functions: one makes a
dict of figures, the other a table of them. `--json` writes all dicts as one.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from minisft.cli.options import add_model_options, load, natural, positive, precision_of
from minisft.config import FORMATS
from minisft.errors import UserError
from minisft.reports.page import check_outputs, write_json


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The options of `minisft eval`."""
    command = commands.add_parser("eval", help="what a model knows and does, in figures", allow_abbrev=False)
    command.add_argument("model", metavar="MODEL", help="a Hugging Face folder, such as runs/my/final")
    command.add_argument("--batch-tokens", type=positive, default=8192, metavar="N",
                         help="tokens in one forward pass (8192)")
    command.add_argument("--limit", type=positive, metavar="N", help="only the first N questions of each file")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    add_model_options(command, max_new_tokens=512)
    group = command.add_argument_group("multiple choice by log-likelihood")
    group.add_argument("--choices", nargs="+", default=[], metavar="FILE",
                       help="questions: MMLU's CSV, TurkishMMLU's JSON, ARC's JSON")
    group.add_argument("--format", choices=("auto", "mmlu", "turkish_mmlu", "arc"), default="auto",
                       help="of the files of questions (auto)")
    group.add_argument("--language", choices=("en", "tr"), default="", help="of the prompt's own words (the format's)")
    group.add_argument("--style", choices=("letter", "text"),
                       help="score the letter of a choice, or its text (text for arc, letter for the others)")
    group.add_argument("--shots", type=natural, default=0, metavar="K", help="answered questions before each (0)")
    group.add_argument("--shots-from", nargs="+", default=[], metavar="FILE",
                       help="files they come from (the other questions of the same subject)")
    group.add_argument("--chat", action="store_true", help="ask in a user's turn of the chat template")
    group = command.add_argument_group("instructions that a program can check")
    group.add_argument("--instructions", metavar="FILE", help="prompts in IFEval's layout, or `instructions`: the "
                       "shipped ones, English and Turkish")
    group.add_argument("--skip-unknown", action="store_true", help="leave out instructions that have no check")
    group = command.add_argument_group("held-out losses")
    group.add_argument("--data", nargs="+", default=[], metavar="FILE",
                       help="conversations, whose answers count, and plain text, in which every token counts")
    group.add_argument("--data-format", choices=FORMATS, default="auto", help="layout of these files (auto)")
    group.add_argument("--seq-len", type=positive, default=2048, metavar="N",
                       help="longer documents are left out, and counted (2048, or the model's context if that is less)")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """All evaluations that the options ask for, of one model."""
    from minisft.evals import choices, heldout, instructions  # late: `minisft --help` does not wait for torch
    from minisft.evals.prompts import prompt_file

    check_outputs({"--json": options.json},
                  (options.model, options.templates, *options.choices, *options.shots_from, *options.data,
                   options.instructions and prompt_file(options.instructions)))
    if not (options.choices or options.instructions or options.data):
        raise UserError("nothing to evaluate; give --choices FILE ..., --instructions FILE or --data FILE ...")
    # All files are read before the weights: an error in them should not take a minute.
    questions = choices.load(options.choices, format=options.format, language=options.language, style=options.style,
                             shots=options.shots, shots_from=options.shots_from, limit=options.limit)
    asked = instructions.load(options.instructions, skip_unknown=options.skip_unknown,
                              limit=options.limit) if options.instructions else None
    # A base model has no chat template, and needs none for plain text.
    template = "" if options.chat or asked or options.data else "text"
    assistant = load(options.model, options, template=template)
    found: dict[str, Any] = {"model": options.model, "precision": precision_of(options)}
    if questions:
        found["choices"] = choices.figures(assistant, questions, chat=options.chat, batch_tokens=options.batch_tokens)
        print(choices.describe(found["choices"]))
    if asked:
        found["instructions"] = instructions.figures(assistant, asked, max_new_tokens=options.max_new_tokens)
        print(instructions.describe(found["instructions"]))
    if options.data:
        with tempfile.TemporaryDirectory() as cache:
            found["losses"] = heldout.file_losses(assistant, options.data, cache=cache, format=options.data_format,
                                                  seq_len=options.seq_len)
        print(heldout.describe(found["losses"]))
    if options.json:
        write_json(options.json, found)
