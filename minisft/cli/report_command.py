"""`minisft report`: a page of a run's figures, or several runs compared; or their logs for TensorBoard."""

import argparse
from pathlib import Path

from minisft.errors import PATH, UserError, printable
from minisft.reports.page import check_outputs, write


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `minisft report` and its options."""
    command = commands.add_parser(
        "report", help="a page of a run's curves, throughput, data and answers; compares several runs",
        usage="minisft report RUN [RUN ...] [--out FILE | --tensorboard FOLDER]", allow_abbrev=False)
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run (run.dir)")
    command.add_argument("--out", type=Path, metavar="FILE", help="the page (report.html in the first run's folder)")
    command.add_argument("--tensorboard", type=Path, metavar="FOLDER",
                         help="write event files instead, into a folder for each run")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the page or the event files."""
    from minisft.reports.logged_run import read_runs, write_events  # imported late, like everything that needs NumPy

    if options.tensorboard:
        if options.out:
            raise UserError("--out and --tensorboard: choose one of them")
        for each in read_runs(options.runs):
            folder = options.tensorboard / each.name.strip("/").replace("/", "-")
            print(f"{printable(folder, PATH)}: {write_events(each, folder):,} values")
        return
    file = options.out or options.runs[0] / "report.html"
    if options.runs[0].is_dir():
        check_outputs({"--out": file}, options.runs)
    runs = read_runs(options.runs)
    from minisft.reports.run_report import page

    write(file, page(runs))
    print(printable(file, PATH))
