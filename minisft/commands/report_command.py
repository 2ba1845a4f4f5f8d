"""`minisft report`: a page of a run's figures, or several runs compared; or their logs for TensorBoard."""

import argparse
from pathlib import Path

from minisft.errors import PATH, UserError, printable
from minisft.reports.page import check_outputs, write


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The options of `minisft report`."""
    command = commands.add_parser(
        "report", help="a page of a run's curves, throughput, data and answers; several runs are compared",
        usage="minisft report RUN [RUN ...] [--out FILE | --tensorboard FOLDER]", allow_abbrev=False)
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run (run.dir)")
    command.add_argument("--out", type=Path, metavar="FILE", help="the page (report.html in the first run's folder)")
    command.add_argument("--tensorboard", type=Path, metavar="FOLDER",
                         help="write event files instead, in a folder for each run")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """The page, or the event files."""
    from minisft.reports.run_report import page  # imported late, as is all that needs NumPy
    from minisft.reports.runs import read_runs

    if options.out and options.tensorboard:
        raise UserError("minisft report: --out and --tensorboard are two things; ask for one at a time")
    file = options.out or options.runs[0] / "report.html"
    if not options.tensorboard and options.runs[0].is_dir():
        check_outputs({"--out": file}, options.runs)
    runs = read_runs(options.runs)
    if options.tensorboard:
        from minisft.reports.tensorboard import write_events

        for each in runs:
            folder = options.tensorboard / each.name.strip("/").replace("/", "-")
            print(f"{printable(folder, PATH)}: {write_events(each, folder):,} values")
        return
    write(file, page(runs))
    print(printable(file, PATH))
