"""A page on which a person rates the answers of two models without knowing which is whose.

Pairs come in an order, and with sides, that a seed decides; each model is on the left as often as on the right. The
page holds questions and answers and nothing else: whose answers are on the left stands in a second file, the key, which
the rater does not need and does not get. So neither the page's source nor the saved ratings give a model away (an
answer that names its model does). Pairs whose answers are the same are ties, and nobody is asked about them.

The page is one file, needs no network, and its policy lets the browser run its own script (by its hash) and no other.
"""

import base64
import hashlib
import json
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.evaluation.answers import Answers
from minisft.evaluation.prompts import Question
from minisft.reports.page import write


def key_file(page: Path) -> Path:
    """Where the key of a page is kept: beside it."""
    return page.parent / f"{page.name}.key.json"


def write_page(page: Path, questions: list[Question], a: Answers, b: Answers, *, seed: int) -> dict[str, Any]:
    """Write the page and its key; returns the key. Raises UserError where the two have no question in common."""
    names = (a.model_id, b.model_id)
    if names[0] == names[1]:
        names = (f"{names[0]} (A)", f"{names[1]} (B)")
    both = [question for question in questions if question.id in a.turns and question.id in b.turns]
    if not both:
        raise UserError("the two models have answered no question of --questions in common")
    same = [question for question in both if a.turns[question.id] == b.turns[question.id]]
    shown = [question for question in both if question not in same]
    if not shown:
        raise UserError(f"all {len(both)} answers of the two models are the same; there is nothing to rate")
    draw = random.Random(seed)
    draw.shuffle(shown)
    lefts = (["a", "b"] * len(shown))[: len(shown)]
    draw.shuffle(lefts)
    pairs = [_pair(question, a, b, left) for question, left in zip(shown, lefts, strict=True)]
    number = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:12]
    key = {"page": number, "model_a": names[0], "model_b": names[1], "seed": seed,
           "pairs": [{"question_id": question.id, "left": left} for question, left in zip(shown, lefts, strict=True)],
           "identical": [question.id for question in same]}
    write(key_file(page), json.dumps(key, indent=1, ensure_ascii=False) + "\n")
    write(page, html({"page": number, "pairs": pairs}))
    return key


def _pair(question: Question, a: Answers, b: Answers, left: str) -> dict[str, Any]:
    first, second = (a, b) if left == "a" else (b, a)
    turns = zip(question.turns, first.turns[question.id], second.turns[question.id], strict=False)
    return {"turns": [{"question": asked, "left": one, "right": other} for asked, one, other in turns]}


def html(data: dict[str, Any]) -> str:
    """The page that shows `data`. Answers are text in a JSON block that no tag can end, and never markup."""
    page = files("minisft.evaluation").joinpath("compare_page.html").read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    # JSON may write any character as \\uXXXX: without < and > no </script>, without & nothing that looks escaped.
    text = json.dumps(data).translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"})
    return page.replace("{{POLICY}}", policy).replace("{{DATA}}", text)  # the data last: they may hold {{POLICY}}
