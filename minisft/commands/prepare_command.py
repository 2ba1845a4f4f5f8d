"""`minisft prepare`: read, render and pack the data of a recipe, and report; nothing is trained."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minisft import config_io
from minisft.commands import RECIPE_HELP
from minisft.reports.page import check_outputs, write, write_json

if TYPE_CHECKING:
    from minisft.prepare import Prepared


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The options of `minisft prepare`."""
    command = commands.add_parser("prepare", help="read, render and pack the data of a recipe, and report; no training",
                                  usage="minisft prepare RECIPE [--section.key value ...] [--dump FILE] [--json FILE] "
                                        "[--verify]",
                                  epilog=RECIPE_HELP, allow_abbrev=False)
    command.add_argument("--dump", type=Path, metavar="FILE",
                         help="write each document's token ids and mask, one JSON a line")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the whole report as JSON")
    command.add_argument("--verify", action="store_true",
                         help="hold all that is stored against its digests, and make again what is damaged")
    command.set_defaults(run=run)


def run(options: argparse.Namespace, recipe: list[str]) -> None:
    """The data of a recipe, as training would see them."""
    from minisft.prepare import inputs, prepare  # imported late, as is all that needs NumPy
    from minisft.reports.data_report import describe, figures

    config = config_io.load(recipe)
    check_outputs({"--dump": options.dump, "--json": options.json}, inputs(config, recipe))
    prepared = prepare(config, verify=options.verify)
    found = figures(prepared)
    if options.dump:
        write(options.dump, dump(prepared))
    if options.json:
        write_json(options.json, found)
    encoding = sys.stdout.encoding or "utf-8"  # one that has no bars shows question marks
    print(describe(found).encode(encoding, "replace").decode(encoding))
    if options.verify:
        stores = {store.key: store for data in (prepared.train, *prepared.evals.values()) for store in data.stores}
        documents, files = sum(map(len, stores.values())), f"{len(stores)} file{'s' * (len(stores) > 1)}"
        print(f"verified {documents:,} documents of {files}: as they were written")


def dump(prepared: "Prepared") -> Iterator[str]:
    """One JSON a training document: where it came from, its token ids, and 1 where a token is trained."""
    for i in range(len(prepared.train)):
        source, line = prepared.train.origin(i)
        ids, trained = prepared.train.document(i)
        document = {"source": source, "line": line, "ids": ids.tolist(), "trained": trained.tolist()}
        yield json.dumps(document) + "\n"
