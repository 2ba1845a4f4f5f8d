"""What a model tuned in English makes of Turkish questions: `carried.py MODEL`.

How many answers name a capital, continent, language or currency; the country's own; and the kind that was asked for?
"""

import json
import sys
from pathlib import Path

from minisft.data.conversation import Turn
from minisft.demo.world import FACTS, LANGUAGES, load_world
from minisft.generate.assistant import Assistant

HELD_OUT = Path("runs/demo-world/heldout-questions.jsonl")
world, asked = load_world(), []
for prompt in (json.loads(line)["prompt"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()):
    asked += [(prompt, country, fact) for country in world for fact in FACTS
              for question in LANGUAGES["tr"][fact]["questions"] if question.format(**country["tr"]) == prompt]
answers = Assistant.load(sys.argv[1]).answer([(Turn("user", prompt),) for prompt, _, _ in asked], max_new_tokens=20)
names = {kind: {country[language][kind] for country in world for language in ("en", "tr")} for kind in FACTS}
told = [[kind for kind in FACTS if any(name in answer for name in names[kind])] for answer in answers]
own = [any(country[language][kind] in answer for kind in kinds for language in ("en", "tr"))
       for answer, kinds, (_, country, _) in zip(answers, told, asked, strict=True)]
print(f"{len(asked)} Turkish questions: {sum(map(bool, told))} answers tell a fact, {sum(own)} one of the country, "
      f"{sum(fact in kinds for kinds, (*_, fact) in zip(told, asked, strict=True))} the kind that was asked for")
