"""`minisft prepare`: read, render and pack the data of a recipe, and report; nothing is trained."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator

from minisft import config_io, prepare
from minisft.data.dataset import Dataset
from minisft.reports.data_report import describe, figures
from minisft.reports.page import check_outputs, write, write_json


def run(options: Namespace) -> None:
    """Prepare the data as training would, and print the report."""
    config = config_io.load(options.recipe)
    check_outputs({"--dump": options.dump, "--json": options.json}, prepare.inputs(config, options.recipe))
    prepared = prepare.prepare(config, verify=options.verify)
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


def _dump(dataset: Dataset) -> Iterator[str]:
    """One JSON object per document: its source, its token ids, 1 for each trained token, and the weights in the loss if
    any is neither 0 nor 1."""
    for i in range(len(dataset)):
        (source, line), (ids, weights) = dataset.origin(i), dataset.document(i)
        record = {"source": source, "line": line, "ids": ids.tolist(), "trained": (weights > 0).astype(int).tolist()}
        yield json.dumps(record | ({"weights": weights.tolist()} if weights.dtype == float else {})) + "\n"
