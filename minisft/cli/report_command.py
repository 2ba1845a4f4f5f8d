"""`minisft report`: a page of a run's figures, or several runs compared; or their logs for TensorBoard."""

import time
from argparse import Namespace

from minisft.errors import PATH, UserError, printable
from minisft.reports.logged_run import EventFiles, read_runs
from minisft.reports.page import check_outputs, write


def run(options: Namespace) -> None:
    """Write the page or the event files."""
    if options.tensorboard:
        if options.out:
            raise UserError("--out and --tensorboard: choose one of them")
        runs = read_runs(options.runs)
        folders = [options.tensorboard / each.name.strip("/").replace("/", "-") for each in runs]
        files = [EventFiles(folder) for folder in folders]
        while options.follow and any(each.status.get("state") in ("running", None) for each in runs):
            for each, written in zip(runs, files, strict=True):
                written.update(each)
            time.sleep(options.follow)
            runs = read_runs(options.runs)
        for each, folder, written in zip(runs, folders, files, strict=True):
            print(f"{printable(folder, PATH)}: {written.update(each):,} values")
        return
    if options.follow:
        raise UserError("--follow goes with --tensorboard")
    file = options.out or options.runs[0] / "report.html"
    if options.runs[0].is_dir():
        check_outputs({"--out": file}, options.runs)
    runs = read_runs(options.runs)
    from minisft.reports.run_report import page  # needs matplotlib, which event files do without

    write(file, page(runs))
    print(printable(file, PATH))
