"""The `minisft` command: everything around a training run.

    minisft prepare RECIPE [--section.key value ...] [--dump FILE] [--json FILE]
    minisft show RECIPE [--section.key value ...] [--index N | --longest | --random [SEED] | --pack N | --step N] ...

Every key of a recipe is an option as well, such as --data.train a.jsonl; `python train.py --help` lists them all.
"""

import argparse
import json
import sys
from pathlib import Path

from minisft import config as configuration
from minisft.data_report import describe, figures
from minisft.errors import EXIT_IO, EXIT_USAGE, UserError
from minisft.preparation import Prepared, prepare
from minisft.show import choose, print_views
from minisft.show_html import check_writable, write_page


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
