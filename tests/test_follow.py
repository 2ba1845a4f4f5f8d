"""docs/follow.py sends every record of a growing log once, to anything with the three calls of wandb and trackio."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
STUB = """
import json, sys
def say(*what): print(json.dumps(what), flush=True)
def init(project, name, config): say("init", project, name, config)
def log(values, step): say("log", values, step)
def finish(): say("finish")
"""


def test_a_growing_log_is_sent_record_by_record(tmp_path):
    (tmp_path / "trackio.py").write_text(STUB)
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "config.toml").write_text("[optim]\nlr = 0.1\n")
    (run / "status.json").write_text('{"state": "running"}')
    records = [{"kind": "eval", "step": 0, "name": "h", "loss": 2.5, "target_tokens": 7},
               *({"kind": "train", "step": step, "loss": 1 / step, "tokens": 9, "note": "x"} for step in (1, 2, 3))]
    lines = [json.dumps(record) + "\n" for record in records]
    (run / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:9])  # one is half written
    process = subprocess.Popen([sys.executable, ROOT / "docs" / "follow.py", run, "--to", "trackio"], text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    found = [json.loads(process.stdout.readline()) for _ in range(3)]
    time.sleep(0.2)
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "status.json").write_text('{"state": "done"}')
    found += map(json.loads, process.communicate(timeout=60)[0].splitlines())
    assert process.returncode == 0
    assert found == [
        ["init", "minisft", "my-run", {"optim": {"lr": 0.1}}],
        ["log", {"eval/h/step": 0, "eval/h/loss": 2.5, "eval/h/target_tokens": 7}, 0],
        *(["log", {"train/step": step, "train/loss": 1 / step, "train/tokens": 9}, step] for step in (1, 2, 3)),
        ["finish"]]
