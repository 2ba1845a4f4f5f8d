"""The `minisft` command: everything around a training run.

    minisft prepare RECIPE   read, render and pack the data, and report; no training
    minisft show RECIPE      documents as the model sees them: every token, and which are trained
    minisft plan RECIPE      memory, time and cost of a run on given GPUs
    minisft chat MODEL       talk to a model, or ask it one question
    minisft eval MODEL       what a model knows and does, in figures
    minisft answer MODEL     a model's answers to a file of questions, for judges, and their signals
    minisft compare A B      a page for blind ratings of two models; win rates of ratings or of a judge
    minisft report RUN ...   a page of a run's curves, throughput, data and answers; several runs compared
    minisft convert A B      a model in another form: an adapter merged, Meta's files as Hugging Face's

`minisft COMMAND --help` has the options of each. Every key of a recipe is an option of the first three as well, such as
--data.train a.jsonl; `python train.py --help` lists them all. Training itself is `torchrun train.py`.
"""

import argparse
import os
import sys
from typing import TextIO

from minisft.commands import answer, chat, compare, convert, evaluate, plan, prepare, report, show
from minisft.errors import EXIT_INTERRUPTED, EXIT_IO, EXIT_USAGE, UserError, printable

OF_RECIPES = (prepare, show, plan)
COMMANDS = (*OF_RECIPES, chat, evaluate, answer, compare, report, convert)
LONGEST = 20_000  # characters of a message


def parser() -> argparse.ArgumentParser:
    """Every command and its options; also what tools that write shell completions ask for (README)."""
    whole = argparse.ArgumentParser(prog="minisft", description=__doc__, allow_abbrev=False,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return whole


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    open_streams()
    options, rest = parser().parse_known_args(argv)  # what is left over are keys of a recipe
    try:
        if any(options.run is command.run for command in OF_RECIPES):
            options.run(options, rest)
        elif rest:
            raise UserError(f"unknown argument {printable(rest[0])}; `minisft {options.command} --help` lists the "
                            "options")
        else:
            options.run(options)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # `| head` has seen enough
        give_up(sys.stdout)
        return 0
    except KeyboardInterrupt:
        return complain("stopped", EXIT_INTERRUPTED)
    except (UserError, OSError) as error:
        return complain(f"error: {error}", EXIT_USAGE if isinstance(error, UserError) else EXIT_IO)


def open_streams() -> None:
    """Closed standard streams (`>&-`) lead nowhere from here on; files opened later would take their places."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def complain(message: str, code: int) -> int:
    """Print `message`, in which names may be foreign, to standard error; returns `code`, also where nobody listens."""
    try:
        print(*(printable(line, LONGEST) for line in message.split("\n")), sep="\n", file=sys.stderr)
    except OSError:
        give_up(sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        give_up(sys.stdout)
    return code


def give_up(stream: TextIO) -> None:
    """What is still to be written to `stream` leads nowhere; Python would complain when it closes it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
