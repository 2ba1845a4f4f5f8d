"""`minisft prepare`: read, render and pack the data of a recipe, and report; nothing is trained."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minisft import config_io
from minisft.cli import add_recipe_command
from minisft.reports.page import check_outputs, write, write_json

if TYPE_CHECKING:
    from minisft.data.dataset import Dataset


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `minisft prepare` and its options."""
    command = add_recipe_command(commands, "prepare", "read, render and pack the data of a recipe, and report",
                                 "[--dump FILE] [--json FILE] [--verify]")
    command.add_argument("--dump", type=Path, metavar="FILE",
                         help="write each document's token ids and mask, one JSON object per line")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the whole report as JSON")
    command.add_argument("--verify", action="store_true",
                         help="check everything in the cache against its digests, and rebuild what is damaged")
    command.set_defaults(run=run)


def run(options: argparse.Namespace, recipe: list[str]) -> None:
    """Prepare the data as training would, and print the report."""
    from minisft.prepare import inputs, prepare  # imported late, like everything that needs NumPy
    from minisft.reports.data_report import describe, figures

    config = config_io.load(recipe)
    check_outputs({"--dump": options.dump, "--json": options.json}, inputs(config, recipe))
    prepared = prepare(config, verify=options.verify)
    found = figures(prepared)
    if options.dump:
        write(options.dump, _dump(prepared.train))
    if options.json:
        write_json(options.json, found)
    encoding = sys.stdout.encoding or "utf-8"  # one without bars shows question marks
    print(describe(found).encode(encoding, "replace").decode(encoding))
    if options.verify:
        stores = {store.key: store for data in (prepared.train, *prepared.evals.values()) for store in data.stores}
        documents, files = sum(map(len, stores.values())), f"{len(stores)} file{'s' * (len(stores) > 1)}"
        print(f"verified {documents:,} documents of {files}: as they were written")


def _dump(dataset: "Dataset") -> Iterator[str]:
    """One JSON object per document: its source, its token ids, and 1 for each trained token."""
    for i in range(len(dataset)):
        (source, line), (ids, trained) = dataset.origin(i), dataset.document(i)
        yield json.dumps({"source": source, "line": line, "ids": ids.tolist(), "trained": trained.tolist()}) + "\n"
