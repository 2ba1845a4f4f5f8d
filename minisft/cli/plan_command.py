"""`minisft plan`: memory, time and cost of a run on given GPUs; no weights are read."""

from argparse import Namespace

from minisft import config_io
from minisft.planning import estimate
from minisft.prepare import inputs
from minisft.reports.page import check_outputs, write_json


def run(options: Namespace) -> None:
    """Print the plan of a recipe."""
    config = config_io.load(options.recipe, planning=True)
    check_outputs({"--json": options.json}, inputs(config, options.recipe))
    found = estimate.figures(config, estimate.PlanOptions(
        estimate.chosen_gpu(options.gpu, options.gpu_memory, options.tflops), options.gpus, options.tokens,
        options.document_length, options.utilisation, options.hours_price))
    if options.json:
        write_json(options.json, found)
    print(estimate.describe(found))
