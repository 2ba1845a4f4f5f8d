"""The `minisft` command: everything around a training run.

    minisft prepare RECIPE [--section.key value ...] [--dump FILE] [--json FILE]

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
