"""The `minisft` command: everything around a training run.

    minisft prepare RECIPE [--section.key value ...] [--dump FILE] [--json FILE]
    minisft show RECIPE [--section.key value ...] [--index N | --longest | --random [SEED] | --pack N | --step N] ...
    minisft plan RECIPE [--section.key value ...] [--gpus N] [--gpu NAME] [--hours-price USD] [--tokens N] ...

Every key of a recipe is an option as well, such as --data.train a.jsonl; `python train.py --help` lists them all.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from minisft import config as configuration
from minisft import planning
from minisft.data_report import describe, figures
from minisft.errors import EXIT_IO, EXIT_USAGE, UserError
from minisft.hardware import find_gpu
from minisft.preparation import Prepared, prepare
from minisft.show import choose, print_views
from minisft.show_html import check_writable, write_page

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="minisft", description=__doc__, formatter_class=as_written,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("prepare", help="read, render and pack the data of a recipe, and report; no training",
                                  usage="minisft prepare RECIPE [--section.key value ...] [--dump FILE] [--json FILE]",
                                  epilog=__doc__.rpartition("\n\n")[2], formatter_class=as_written, allow_abbrev=False)
    command.add_argument("--dump", type=Path, metavar="FILE",
                         help="write each document's token ids and mask, one JSON a line")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the whole report as JSON")
    command.set_defaults(run=run_prepare)
    add_show(commands)
    add_plan(commands)
    options, recipe = parser.parse_known_args(argv)
    try:
        options.run(options, recipe)
        return 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UserError) else EXIT_IO


def run_prepare(options: argparse.Namespace, recipe: list[str]) -> None:
    """The data of a recipe, as training would see them."""
    prepared = prepare(configuration.load(recipe))
    found = figures(prepared)
    if options.dump:
        dump(prepared, options.dump)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    encoding = sys.stdout.encoding or "utf-8"  # one that has no bars shows question marks
    print(describe(found).encode(encoding, "replace").decode(encoding))


def add_show(commands: "argparse._SubParsersAction") -> None:
    """The options of `minisft show`."""
    command = commands.add_parser(
        "show", help="show documents as the model sees them: every token, and which are trained",
        usage="minisft show RECIPE [--section.key value ...] [options]", epilog=__doc__.rpartition("\n\n")[2],
        allow_abbrev=False)
    command.add_argument("--index", type=int, metavar="N", help="document N, from 0")
    command.add_argument("--longest", action="store_true", help="the longest document")
    command.add_argument("--random", type=int, nargs="?", const=0, metavar="SEED", help="a few documents at random")
    command.add_argument("--source", metavar="NAME", help="among the documents of one source of data.train, data.eval")
    command.add_argument("--pack", type=int, metavar="N", help="pack N, from 0, of the first epoch or of --step")
    command.add_argument("--step", type=int, metavar="N", help="the packs of step N, from 1 as in metrics.jsonl")
    command.add_argument("--ids", action="store_true", help="one token a line, with its position and id")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows a whole pack")
    command.set_defaults(run=run_show)


def run_show(options: argparse.Namespace, recipe: list[str]) -> None:
    """Documents of a recipe, on the terminal or as a page."""
    if options.html:
        check_writable(options.html)
    views = choose(prepare(configuration.load(recipe)), source=options.source, index=options.index,
                   longest=options.longest, random=options.random, pack=options.pack, step=options.step,
                   whole=bool(options.html))
    if options.html:
        write_page(options.html, views)
        print(options.html, *(view.heading for view in views), sep="\n  ")
    else:
        print_views(views, ids=options.ids)


def add_plan(commands: "argparse._SubParsersAction") -> None:
    """The options of `minisft plan`."""
    command = commands.add_parser(
        "plan", help="memory, time and cost of a run on given GPUs, before it is paid for",
        usage="minisft plan RECIPE [--section.key value ...] [options]", epilog=__doc__.rpartition("\n\n")[2],
        allow_abbrev=False)
    command.add_argument("--gpus", type=at_least_one, default=8, metavar="N", help="GPUs, over all hosts (8)")
    command.add_argument("--gpu", default="h100", metavar="NAME", help="kind of GPU, as in hardware.toml (h100)")
    command.add_argument("--hours-price", type=float, metavar="USD", help="price of one GPU for an hour")
    command.add_argument("--tokens", type=count, metavar="N", help="tokens of the data, such as 50M, instead of "
                         "reading them")
    command.add_argument("--document-length", type=count, metavar="N", help="with --tokens: tokens of a document "
                         "(data.seq_len)")
    command.add_argument("--utilisation", type=share, default=planning.UTILISATION, metavar="SHARE",
                         help=f"share of the peak that is reached, recomputation included ({planning.UTILISATION})")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    command.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace, recipe: list[str]) -> None:
    """The plan of a recipe; no weights are read."""
    found = planning.figures(configuration.load(recipe), find_gpu(options.gpu), gpus=options.gpus,
                             tokens=options.tokens, document=options.document_length,
                             utilisation=options.utilisation, price=options.hours_price)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(planning.describe(found))


def at_least_one(text: str) -> int:
    """A whole number from 1."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def count(text: str) -> int:
    """A number of tokens: 500, 50K, 1.5M, 2B."""
    number = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMB]?)", text.upper())
    if not number:
        raise ValueError
    return at_least_one(str(round(float(number[1]) * UNITS[number[2]])))


def share(text: str) -> float:
    """A number above 0, up to 1."""
    if not 0 < (number := float(text)) <= 1:
        raise ValueError
    return number


def dump(prepared: Prepared, file: Path) -> None:
    """One JSON a training document: where it came from, its token ids, and 1 where a token is trained."""
    with open(file, "w", encoding="utf-8") as out:
        for i in range(len(prepared.train)):
            source, line = prepared.train.origin(i)
            ids, trained = prepared.train.document(i)
            document = {"source": source, "line": line, "ids": ids.tolist(), "trained": trained.tolist()}
            out.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    sys.exit(main())
