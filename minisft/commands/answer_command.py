"""`minisft answer`: a model's answers to a file of questions, for judges, and their signals."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.commands.numbers import positive
from minisft.errors import PATH, printable
from minisft.reports.page import check_outputs, write_json

if TYPE_CHECKING:
    from minisft.evaluation.assistant import Assistant


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The options of `minisft answer`."""
    command = commands.add_parser(
        "answer", help="answer a file of questions for a judge, and count words, repetitions and praise",
        usage="minisft answer MODEL --questions FILE --out FILE [options]", allow_abbrev=False,
        epilog="A command that was stopped goes on where it was; with nothing left to answer it only prints the "
               "signals.")
    command.add_argument("model", metavar="MODEL", help="a Hugging Face folder, such as runs/my/final")
    command.add_argument("--questions", required=True, metavar="FILE",
                         help="mt-en or mt-tr (shipped), or a file in FastChat's or IFEval's layout")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the answers, in FastChat's layout")
    command.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    command.add_argument("--model-id", default="", metavar="NAME", help="name of the model in the file (its folder's)")
    command.add_argument("--flips", action="store_true", help="also the flip test: does doubt change an answer?")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    add_model_options(command)
    command.set_defaults(run=run)


def add_model_options(command: argparse.ArgumentParser) -> None:
    """The options of commands that let a model answer."""
    command.add_argument("--max-new-tokens", type=positive, default=1024, metavar="N", help="longest answer (1024)")
    command.add_argument("--batch", type=positive, default=8, metavar="N", help="questions side by side (8)")
    command.add_argument("--template", default="", metavar="NAME", help="chat template (the one that the folder tells)")
    command.add_argument("--templates", default="", metavar="FILE", help="TOML file with templates of your own")
    command.add_argument("--precision", choices=("bf16", "fp32"), help="of weights and products (bf16 on a GPU, else "
                         "fp32)")


def run(options: argparse.Namespace) -> None:
    """Answer, then describe the answers."""
    from minisft.evaluation import answers, prompts, signals

    check_outputs({"--out": options.out, "--json": options.json},
                  (prompts.question_file(options.questions), options.model, options.templates), appended=("--out",))
    questions = prompts.load_questions(options.questions)[: options.limit]
    model_id = options.model_id or answers.model_name(options.model)
    assistant = None
    with answers.alone(options.out):
        if options.flips or answers.unanswered(questions, options.out, model_id=model_id):
            assistant = load(options.model, options)
            answers.write_answers(assistant, questions, options.out, model_id=model_id,
                                  max_new_tokens=options.max_new_tokens, batch=options.batch)
        found = answers.read_answers(options.out)
    figures = signals.signals((turn for turns in found.turns.values() for turn in turns), found.cut)
    flips = signals.flip_figures(assistant, batch=options.batch, max_new_tokens=min(64, options.max_new_tokens)
                                 ) if options.flips and assistant else None
    print(f"{printable(options.out, PATH)}: {printable(found.model_id)}, {len(found.turns)} questions")
    print(signals.describe(figures, flips))
    if options.json:
        write_json(options.json, {"model": found.model_id, "signals": figures, "flips": flips})


def precision_of(options: argparse.Namespace) -> str:
    """Of the weights, where the options do not say: bf16 on a GPU, fp32 without one."""
    import torch

    return options.precision or ("bf16" if torch.cuda.is_available() else "fp32")


def load(path: str, options: argparse.Namespace, *, template: str = "") -> "Assistant":
    """The Assistant in a folder, on the GPU where there is one; `template` where the options name none."""
    import torch  # here, so that `minisft --help` does not wait for it

    from minisft.evaluation.assistant import Assistant
    from minisft.model.llama import DTYPES

    return Assistant.load(path, template=options.template or template, templates=options.templates,
                          device="cuda" if torch.cuda.is_available() else "cpu",
                          dtype=DTYPES[precision_of(options)])
