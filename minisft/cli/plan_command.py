"""`minisft plan`: memory, time and cost of a run on given GPUs; no weights are read."""

import argparse
from pathlib import Path

from minisft import config_io
from minisft.cli import add_recipe_command
from minisft.cli.options import count, positive, price, share
from minisft.planning import UTILISATION
from minisft.reports.page import check_outputs, write_json


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `minisft plan` and its options."""
    command = add_recipe_command(commands, "plan", "memory, time and cost of a run, before you pay for it")
    command.add_argument("--gpus", type=positive, default=8, metavar="N", help="GPUs, over all hosts (8)")
    command.add_argument("--gpu", default="h100", metavar="NAME", help="kind of GPU, as in gpus.toml (h100)")
    command.add_argument("--hours-price", type=price, metavar="USD", help="price of one GPU for an hour")
    command.add_argument("--tokens", type=count, metavar="N", help="tokens of the data, such as 50M, instead of "
                         "reading it")
    command.add_argument("--document-length", type=count, metavar="N", help="with --tokens: tokens of a document "
                         "(data.seq_len)")
    command.add_argument("--utilisation", type=share, default=UTILISATION, metavar="SHARE",
                         help=f"share of peak FLOPs to assume, recomputation included ({UTILISATION})")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    command.set_defaults(run=run)


def run(options: argparse.Namespace, recipe: list[str]) -> None:
    """Print the plan of a recipe."""
    from minisft.planning import estimate  # imported late, like everything that needs torch or NumPy
    from minisft.prepare import inputs

    config = config_io.load(recipe)
    check_outputs({"--json": options.json}, inputs(config, recipe))
    found = estimate.figures(config, estimate.PlanOptions(
        estimate.find_gpu(options.gpu), options.gpus, options.tokens, options.document_length, options.utilisation,
        options.hours_price))
    if options.json:
        write_json(options.json, found)
    print(estimate.describe(found))
