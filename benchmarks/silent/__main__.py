"""Silent bugs: exhibits that any trainer for supervised fine-tuning can be held to.

    python benchmarks/silent --list                                  the exhibits and the trainers
    python benchmarks/silent --trainer minisft                       one column of the matrix
    python benchmarks/silent --trainer plain --planted               the controls: the loop with each exhibit's fault
    python benchmarks/silent --trainer trl --exhibit leak --json silent.json
    python benchmarks/silent --json silent.json --html silent.html   the page of what is in silent.json
    python benchmarks/silent --json silent.json --markdown minisft trl    a table of two columns for a document

Run it with the Python that has the trainer (README.md has the environments); it needs torch, tokenizers, safetensors
and numpy. An exhibit hands a trainer a few lines of data and a tiny Llama made on the spot, and looks from outside at
the rows, the losses and the weights. `--json` keeps the columns that are in the file already, so one column after
another fills the matrix.

    right             the trainer does what the definitions say
    WRONG             it does something else and says nothing; the figure says how far off
    warned            it does something else, and a message of its own names it
    cannot            it refuses, or offers no way to do what the exhibit asks for
    not applicable    the exhibit asks about something that the trainer does not have by design

Exit code 1 if a column has a WRONG, 0 otherwise; with --planted the other way round: 1 if a fault goes unnoticed.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path[:] = [str(Path(__file__).resolve().parents[1]), *(p for p in sys.path if Path(p) != Path(__file__).parent)]

from silent import page  # noqa: E402
from silent.exhibits import NAMES, open_exhibit, title  # noqa: E402
from silent.run import column  # noqa: E402
from silent.trainers import TRAINERS  # noqa: E402


def listing() -> str:
    """The exhibits and the trainers."""
    lines = [f"{name:18s} {title(open_exhibit(name))}" for name in NAMES]
    return "\n".join([*lines, "", "trainers: " + ", ".join(TRAINERS)])


def tell(exhibit: str, verdict: dict) -> None:
    """Print a verdict."""
    print(f"{exhibit:18s} {page.STATES[verdict['state']]:14s} {verdict['text']}  ({verdict['seconds']:.1f} s)",
          flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for, merge it into the JSON, print the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", action="append", default=[], choices=TRAINERS, metavar="NAME")
    parser.add_argument("--exhibit", action="append", default=[], choices=NAMES, metavar="NAME")
    parser.add_argument("--planted", action="store_true", help="plant each exhibit's fault in the plain loop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the columns to FILE")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the matrix as one page")
    parser.add_argument("--markdown", nargs="+", default=[], metavar="COLUMN",
                        help="print these as Markdown instead, with the rows of --exhibit if it is given")
    parser.add_argument("--list", action="store_true", help="list exhibits and trainers")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="exhibits at a time; 0: as the trainer needs")
    parser.add_argument("--debug", action="store_true", help="print what the trainer says, and tracebacks")
    options = parser.parse_args(argv)
    if options.list:
        print(listing())
        return 0
    matrix = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    if not (options.trainer or matrix):
        parser.error("name a --trainer, or a --json file that has columns")
    if options.planted and options.trainer != ["plain"]:
        parser.error("faults are planted in the plain loop: --trainer plain --planted")
    if unknown := set(options.markdown) - {*matrix, *options.trainer}:
        parser.error(f"--markdown: no column {', '.join(sorted(unknown))} (there are {', '.join(matrix) or 'none'})")
    wrong = False
    for name in options.trainer:
        found = column(name, options.exhibit or list(NAMES), tell, planted=options.planted, debug=options.debug,
                       jobs=options.jobs)
        states = [verdict["state"] for verdict in found["exhibits"].values()]
        wrong |= any(state != "wrong" for state in states) if options.planted else "wrong" in states
        key = "planted" if options.planted else name
        kept = matrix.get(key, {}).get("exhibits", {}) if options.exhibit else {}
        matrix[key] = found | {"exhibits": kept | found["exhibits"]}
        if kept:
            matrix[key]["seconds"] = round(sum(v["seconds"] for v in matrix[key]["exhibits"].values()), 1)
        if options.json:
            options.json.write_text(json.dumps(matrix, indent=1) + "\n")
    rows = tuple(options.exhibit) or NAMES
    print(page.markdown(matrix, tuple(options.markdown), rows) if options.markdown else "\n" + page.text(matrix))
    if options.html:
        options.html.write_text(page.html(matrix), encoding="utf-8")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
