"""`minisft report`: a page of a run's figures, or several runs compared; or their logs for TensorBoard."""

from argparse import Namespace

from minisft.errors import PATH, UserError, printable
from minisft.reports.logged_run import read_runs, write_events
from minisft.reports.page import check_outputs, write


def run(options: Namespace) -> None:
    """Write the page or the event files."""
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
    from minisft.reports.run_report import page  # needs matplotlib, which event files do without

    write(file, page(runs))
    print(printable(file, PATH))
