"""Draw the documents' figures from the logs of real runs.

    torchrun train.py && python benchmarks/figures.py runs/demo

Writes docs/images/RUN-loss.svg, and RUN-forgetting.svg if the log records forgetting.
"""

import argparse
import sys
from pathlib import Path

from minisft.errors import EXIT_USAGE, UserError
from minisft.reports import drawing, run_report
from minisft.reports.page import write
from minisft.reports.runs import read_runs


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
                    write(file, drawing.alone(drawing.lines(panels)))
                    print(file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
