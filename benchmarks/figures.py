"""Draw the documents' figures from the logs of real runs.

    torchrun train.py && python benchmarks/figures.py runs/demo

Writes docs/images/RUN-loss.svg, and RUN-forgetting.svg if the log records forgetting.
"""

import argparse
import sys
from pathlib import Path

from minisft.errors import EXIT_USAGE, UserError
from minisft.reports import drawing, run_report
from minisft.reports.logged_run import read_runs
from minisft.reports.page import style, write


def standalone(svg: str) -> str:
    """A figure as a file of its own, with its colours and a background."""
    head, _, rest = svg.partition(">")
    return (f'{head} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
            f"\n<style>\n{style('colours')}svg {{ background: var(--page) }}</style>{rest}\n")


def main() -> int:
    """Write one file for each figure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), metavar="FOLDER")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for run in read_runs(options.runs):
            for name, panels in (("loss", run_report.loss_panels([run])),
                                 ("forgetting", run_report.forgetting_panels([run]))):
                if panels:
                    file = options.out / f"{Path(run.name).name}-{name}.svg"
                    write(file, standalone(drawing.lines(panels)))
                    print(file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
