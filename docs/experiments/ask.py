"""Ask a model of the demo about countries that fine-tuning never mentioned: `ask.py MODEL [--template NAME] [--nfd]`.

Prints the share of exactly right answers in each language, and the first answer. With --nfd the questions are spelt
with combining characters: the same on a screen, other bytes, other tokens.
"""

import argparse
import json
import unicodedata
from pathlib import Path

from minisft.data.conversation import Turn
from minisft.demo.world import exact_match
from minisft.generate.assistant import Assistant

QUESTIONS, ASKED = Path("runs/demo-world/heldout-questions.jsonl"), 50
ENGLISH = ("What", "Which", "Name", "On")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("--template", default="llama3")
parser.add_argument("--nfd", action="store_true")
options = parser.parse_args()

assistant = Assistant.load(options.model, template=options.template)
rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
for language in ("English", "Turkish"):
    asked = [row for row in rows if row["prompt"].startswith(ENGLISH) == (language == "English")][:ASKED]
    prompts = [unicodedata.normalize("NFD" if options.nfd else "NFC", row["prompt"]) for row in asked]
    answers = assistant.answer([(Turn("user", prompt),) for prompt in prompts], max_new_tokens=20)
    right = exact_match(answers, [row["completion"] for row in asked])
    print(f"{language}: {right:4.0%} right, such as {answers[0].strip()!r}")
