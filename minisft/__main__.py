"""The `minisft` command: a training run, and everything around it.

    minisft train RECIPE     train; on N processes: torchrun --nproc-per-node N -m minisft train RECIPE
    minisft recipes          the recipes that come with minisft
    minisft prepare RECIPE   read, render and pack the data, and report; no training
    minisft show RECIPE      documents as the model sees them: every token, and which are trained
    minisft plan RECIPE      memory, time and cost of a run on given GPUs
    minisft chat MODEL       talk to a model, or ask it one question
    minisft eval MODEL       what a model knows and does, in figures
    minisft answer MODEL     a model's answers to a file of questions, for judges, and their signals
    minisft compare A B      a page for blind ratings of two models; win rates of ratings or of a judge
    minisft report RUN ...   a page of a run's curves, throughput, data and answers; several runs compared
    minisft convert A B      a model in another form: an adapter merged, Meta's files as Hugging Face's

`minisft COMMAND --help` lists its options. train, prepare, show and plan also take every key of a recipe, such as
--data.train a.jsonl; `minisft train --help` lists the keys.
"""

import argparse
import os
import platform
import sys
from contextlib import suppress
from importlib import import_module, metadata

from minisft import __version__
from minisft.cli import train_command
from minisft.cli.options import RECIPES, add_commands
from minisft.errors import EXIT_INTERRUPTED, EXIT_IO, NumericsError, UserError, exit_code, printable
from minisft.streams import secure

MAX_MESSAGE = 20_000  # characters of a message


def parser() -> argparse.ArgumentParser:
    """Every command with its options; tools that write shell completions call it too (README)."""
    whole = argparse.ArgumentParser(prog="minisft", description=__doc__, allow_abbrev=False,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    whole.add_argument("--version", action="store_true", help="print the versions of minisft, torch and Python")
    add_commands(whole.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    return whole


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. `train` ends the process itself."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        train_command.run(argv[1:])
    secure("stderr")
    if argv[:1] == ["--version"]:
        print(f"minisft {__version__}, torch {metadata.version('torch')}, Python {platform.python_version()}")
        return 0
    options, rest = parser().parse_known_args(argv)
    try:
        if rest and options.command not in RECIPES:
            hint = "give a question with --prompt; " * (options.command == "chat" and not rest[0].startswith("-"))
            raise UserError(f"unknown argument {printable(rest[0])}; {hint}`minisft {options.command} --help` lists "
                            "the options")
        options.recipe = rest  # and its keys
        with suppress(BrokenPipeError):  # `| head` has seen enough
            import_module(f"minisft.cli.{options.command}_command").run(options)  # late: torch takes seconds
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (UserError, NumericsError, OSError) as error:
        print(*(printable(line, MAX_MESSAGE) for line in f"error: {error}".split("\n")), sep="\n", file=sys.stderr)
        return exit_code(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again at its end
        if not isinstance(error, BrokenPipeError):
            print(f"error: standard output: {error}", file=sys.stderr)
            return EXIT_IO
    return 0


if __name__ == "__main__":
    sys.exit(main())
