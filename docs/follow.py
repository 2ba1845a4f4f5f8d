"""Send a run's log to Weights & Biases or trackio while it grows: `python docs/follow.py runs/my --to wandb|trackio`.

Both have the same three calls. If a resumed run has rewound its log, the steps that it takes again are sent again; a
service that accepts no earlier step keeps the first values.
"""

import argparse
import importlib
import json
import time
import tomllib
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", type=Path)
parser.add_argument("--to", choices=("wandb", "trackio"), required=True)
parser.add_argument("--project", default="minisft")
options = parser.parse_args()

service = importlib.import_module(options.to)
config = tomllib.loads((options.run / "config.toml").read_text(encoding="utf-8"))
service.init(project=options.project, name=options.run.resolve().name, config=config)
sent, ended = 0, False
while not ended:
    ended = json.loads((options.run / "status.json").read_text())["state"] != "running"  # before the last look
    lines = (options.run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]  # the last one may be half written
    for record in map(json.loads, lines[min(sent, len(lines)):]):
        prefix = f"eval/{record['name']}" if record["kind"] == "eval" else record["kind"]
        service.log({f"{prefix}/{key}": value for key, value in record.items() if isinstance(value, int | float)},
                    step=record["step"])
    sent = len(lines)
    time.sleep(0 if ended else 2)
service.finish()
