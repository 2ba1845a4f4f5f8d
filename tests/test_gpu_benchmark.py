"""Every row of benchmarks/gpu.py runs on a CPU with toy sizes: on a rented GPU nothing fails for a typing error."""

import json
import subprocess
import sys

import pytest
from small_runs import HERE

QUICK = ("ceilings", "context")
SLOW = ("head", "evaluation", "optimizer", "gradients", "sync", "block", "lora8b", "peers8192", "train1b", "fsdp",
        "full8b", "resume", "tests", "generation", "fp8", "peers4096", "many")


def check(folder, *rows):
    command = [sys.executable, str(HERE.parent / "benchmarks" / "gpu.py"), "--check", "--out",
               str(folder / "gpu.jsonl"), "--rows", *rows]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done, [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("rows", [QUICK, *(pytest.param((row,), marks=pytest.mark.slow) for row in SLOW)],
                         ids=lambda rows: "-".join(rows))
def test_a_row_runs_and_its_figures_are_kept(tmp_path, rows):
    done, records = check(tmp_path, *rows)
    assert {record["row"]: record["ended"] for record in records if "ended" in record} == dict.fromkeys(rows, "done"), \
        done.stdout
    assert done.returncode == 0
    for row in rows:
        figures = [record for record in records if record["row"] == row and "figure" in record]
        assert figures
        assert all(f"| {row} | {figure['figure']} |" in done.stdout for figure in figures)
    again, kept = check(tmp_path, *rows)  # rows that are there are not measured again
    assert (again.returncode, kept) == (0, records)


def test_all_rows_are_tried():
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    import gpu

    assert {*QUICK, *SLOW} == {*gpu.ROWS}
