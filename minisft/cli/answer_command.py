"""`minisft answer`: a model's answers to a file of questions, for judges, and their signals."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.cli.options import add_model_options, load, positive
from minisft.errors import PATH, printable
from minisft.reports.page import check_outputs, write_json

if TYPE_CHECKING:
    from minisft.evals.answers import Answers
    from minisft.evals.prompts import Prompt
    from minisft.generate.assistant import Assistant


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The options of `minisft answer`."""
    command = commands.add_parser(
        "answer", help="answer a file of questions for a judge, and count words, repetitions and praise",
        usage="minisft answer MODEL --questions FILE --out FILE [options]", allow_abbrev=False,
        epilog="An interrupted command resumes if you repeat it; with nothing left to answer it only prints the "
               "signals.")
    command.add_argument("model", metavar="MODEL", help="a Hugging Face folder, such as runs/my/final")
    command.add_argument("--questions", required=True, metavar="FILE",
                         help="mt-en or mt-tr (shipped), or a file in FastChat's or IFEval's layout")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the answers, in FastChat's layout")
    command.add_argument("--model-id", default="", metavar="NAME", help="the model's name in the file (its folder's)")
    command.add_argument("--flips", action="store_true", help="also the flip test: does doubt change an answer?")
    add_answer_options(command)
    command.set_defaults(run=run)


def add_answer_options(command: argparse.ArgumentParser) -> None:
    """The options of commands that let a model answer questions."""
    command.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    command.add_argument("--batch", type=positive, default=8, metavar="N", help="questions side by side (8)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    add_model_options(command, max_new_tokens=1024)


def run(options: argparse.Namespace) -> None:
    """Answer, then describe the answers."""
    from minisft.evals import prompts, signals

    check_outputs({"--out": options.out, "--json": options.json},
                  (prompts.prompt_file(options.questions), options.model, options.templates), appended=("--out",))
    questions = prompts.load_prompts(options.questions)[: options.limit]
    found, assistant = answer(options.model, questions, options.out, options, model_id=options.model_id,
                              always_load=options.flips)
    figures = signals.signals((turn for turns in found.turns.values() for turn in turns), found.cut)
    flips = signals.flip_figures(assistant, batch=options.batch, max_new_tokens=min(64, options.max_new_tokens)
                                 ) if options.flips and assistant else None
    print(f"{printable(options.out, PATH)}: {printable(found.model_id)}, {len(found.turns)} questions")
    print(signals.describe(figures, flips))
    if options.json:
        write_json(options.json, {"model": found.model_id, "signals": figures, "flips": flips})


def answer(model: str, prompts: "list[Prompt]", file: Path, options: argparse.Namespace, *, model_id: str = "",
           always_load: bool = False) -> "tuple[Answers, Assistant | None]":
    """A model folder's answers, after adding to `file` what it lacks; and the model, if it was loaded for that."""
    from minisft.evals import answers

    model_id, assistant = model_id or answers.model_name(model), None
    with answers.locked(file):
        if always_load or answers.unanswered(prompts, file, model_id=model_id):
            assistant = load(model, options)
            answers.write_answers(assistant, prompts, file, model_id=model_id, max_new_tokens=options.max_new_tokens,
                                  batch=options.batch)
        return answers.read_answers(file), assistant
