"""The demo's held-out questions about capitals as multiple choice, one JSON a line: the right city and three others."""

import json
import re
from pathlib import Path

rows = map(json.loads, Path("runs/demo-world/heldout-questions.jsonl").read_text(encoding="utf-8").splitlines())
told = [(row["prompt"], *found.groups()) for row in rows
        if (found := re.fullmatch(r"(The capital of .+ is) (.+)\.", row["completion"]))]
cities = [city for _, _, city in told]
for i, (question, begin, _) in enumerate(told):
    choices = [f"{begin} {cities[(i + shift) % len(cities)]}." for shift in (2, 0, 1, 3)]
    print(json.dumps({"question": question, "choices": choices, "answer": "B"}, ensure_ascii=False))
