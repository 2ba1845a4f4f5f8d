"""Draw the documents' figures from the logs of real runs.

    torchrun train.py && python benchmarks/figures.py runs/demo

Writes docs/images/RUN-loss.svg, and RUN-forgetting.svg if the log records forgetting.
"""

import argparse
import re
import sys
from html import escape
from pathlib import Path

from minisft.errors import EXIT_USAGE, UserError
from minisft.reports import drawing, run_report
from minisft.reports.logged_run import read_runs
from minisft.reports.page import style, write


def standalone(title: str, panels: list[drawing.Panel]) -> str:
    """Panels side by side as a file of its own, with its colours and a background, and words for who cannot see it."""
    drawn = [re.sub('<g class="at">.*?</g>', "", drawing.lines(panel)).replace('pt"', '"', 2) for panel in panels]
    width, height = map(float, re.findall(r"[\d.]+", drawn[0])[:2])
    inner = "".join(svg.replace("<svg", f'<svg x="{width * i:g}"', 1) for i, svg in enumerate(drawn))
    whole = width * len(drawn)
    shown = "; ".join(panel.title for panel in panels)
    return (f'<svg width="{whole:g}pt" height="{height:g}pt" viewBox="0 0 {whole:g} {height:g}" '
            'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">\n'
            f"<title>{escape(title)}</title>\n<desc>By step: {escape(shown)}</desc>\n"
            f"<style>\n{style('colours')}svg {{ background: var(--page) }}</style>{inner}</svg>\n")


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
                    write(file, standalone(f"{run.name}: {name}", panels))
                    print(file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
