"""`minisft show`: documents as the model sees them, on the terminal or as a page."""

import argparse
from pathlib import Path

from minisft import config_io
from minisft.cli import add_recipe_command
from minisft.cli.options import natural, whole
from minisft.errors import PATH, printable
from minisft.reports.page import check_outputs, write


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `minisft show` and its options."""
    command = add_recipe_command(commands, "show",
                                 "show documents as the model sees them: every token, and which are trained")
    command.add_argument("--index", type=whole, metavar="N", help="document N, from 0")
    command.add_argument("--longest", action="store_true", help="the longest document")
    command.add_argument("--random", type=natural, nargs="?", const=0, metavar="SEED", help="a few random documents")
    command.add_argument("--source", metavar="NAME", help="only documents from one source of data.train or data.eval")
    command.add_argument("--pack", type=whole, metavar="N", help="pack N, from 0, of the first epoch or of --step")
    command.add_argument("--step", type=whole, metavar="N", help="the packs of step N, from 1 as in metrics.jsonl")
    command.add_argument("--ids", action="store_true", help="one token per line, with its position and id")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows a whole pack")
    command.set_defaults(run=run)


def run(options: argparse.Namespace, recipe: list[str]) -> None:
    """Show the chosen documents, and warn about fields that nothing reads."""
    from minisft.prepare import inputs, prepare  # imported late, like everything that needs NumPy
    from minisft.reports.data_report import unread_fields
    from minisft.reports.token_view import as_page, choose, print_views

    config = config_io.load(recipe)
    check_outputs({"--html": options.html}, inputs(config, recipe))
    prepared = prepare(config)
    views = choose(prepared, source=options.source, index=options.index, longest=options.longest,
                   random=options.random, pack=options.pack, step=options.step, whole=bool(options.html))
    if options.html:
        write(options.html, as_page(views))
        print(printable(options.html, PATH), *(view.heading for view in views), sep="\n  ")
    else:
        print_views(views, ids=options.ids)
    for line in unread_fields(prepared):
        print("warning:", line)
