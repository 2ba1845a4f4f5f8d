"""Two models compared blind: a page on which a person rates answers, and win rates from ratings or from a judge.

A seed decides the order of the pairs and their sides; each model is on the left as often as on the right. The page
holds questions and answers only; a second file, the key, tells whose answers are on the left. So neither the page's
source nor saved ratings give a model away. Pairs with the same answers are ties, and nobody is asked about them.

A judge's file is in FastChat's layout, pairwise or single:

    {"question_id": 1, "model_1": "m", "model_2": "n", "g1_winner": "model_1", "g2_winner": "tie", "turn": 1, ...}
    {"question_id": 1, "model": "m", "score": 7, "turn": 1, ...}

As in FastChat, a model wins a pair only if it wins in both orders, and scores within 0.1 are a tie. A pair that several
people or judges rate counts once, with the mean. Interval and p-value take ratings for independent; two turns of one
question are not quite, so each turn also has its own line.
"""

import base64
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from math import isfinite, nan
from pathlib import Path
from statistics import mean
from typing import Any

from minisft.errors import PATH, SHORT, UserError, printable
from minisft.evals.answers import Answers
from minisft.evals.questions import Prompt, json_lines
from minisft.evals.rates import percent, rate, sign_test

TIE = 0.1  # FastChat's TIE_DELTA
Unit = tuple[int | str, int]  # question, turn; turn 0 is a whole conversation
Verdicts = dict[tuple[str, str], dict[Unit, list[float]]]  # two models -> 1 if the first won, 0 if the second, 0.5: tie


def blind_page(prompts: list[Prompt], a: Answers, b: Answers, *, seed: int) -> tuple[str, dict[str, Any]]:
    """The page (HTML) and its key. Raises UserError if there is no pair to rate."""
    side_a, side_b = (" (A)", " (B)") if a.model_id == b.model_id else ("", "")
    both = [prompt for prompt in prompts if prompt.id in a.turns and prompt.id in b.turns]
    if not both:
        raise UserError("the two models have answered no question of --questions in common; answer the same file with "
                        "both")
    shown = [prompt for prompt in both if a.turns[prompt.id] != b.turns[prompt.id]]
    if not shown:
        raise UserError(f"all {len(both)} answers of the two models are the same; there is nothing to rate")
    draw = random.Random(seed)
    draw.shuffle(shown)
    lefts = (["a", "b"] * len(shown))[: len(shown)]
    draw.shuffle(lefts)
    sides = [(a, b) if left == "a" else (b, a) for left in lefts]
    pairs = [{"turns": [{"question": question, "left": one, "right": other,
                         **{f"{side}_cut": True for side, answers in (("left", left), ("right", right))
                            if answers.cut.get(prompt.id, {turn: False})[turn]}} for turn, (question, one, other) in
                        enumerate(zip(prompt.turns, left.turns[prompt.id], right.turns[prompt.id], strict=False))]}
             for prompt, (left, right) in zip(shown, sides, strict=True)]
    number = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:12]
    return _html({"page": number, "pairs": pairs}), {
        "page": number, "model_a": a.model_id + side_a, "model_b": b.model_id + side_b, "seed": seed,
        "pairs": [{"question_id": prompt.id, "left": left} for prompt, left in zip(shown, lefts, strict=True)],
        "identical": [prompt.id for prompt in both if a.turns[prompt.id] == b.turns[prompt.id]]}


def _html(data: dict[str, Any]) -> str:
    """The page that shows `data`, without network: its policy lets the browser run its own script, by its hash, only.

    Answers are text in a JSON block that no tag can end, and never markup.
    """
    page = Path(__file__).with_name("compare_page.html").read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    # JSON may write any character by its number: without < and > no </script>, without & nothing that looks escaped.
    text = json.dumps(data).translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"})
    return page.replace("{{POLICY}}", policy).replace("{{DATA}}", text)  # the data last: they may hold {{POLICY}}


def read_ratings(ratings: Iterable[Path], keys: Iterable[Path]) -> Verdicts:
    """The verdicts of raters. Raises UserError for files that do not belong together."""
    by_page = {key["page"]: key for key in map(_read_key, keys)}
    found: Verdicts = defaultdict(lambda: defaultdict(list))
    used = {}  # keys of the pages that are rated
    for file in ratings:
        rated = _json_object(file)
        if not (isinstance(rated.get("ratings"), dict) and isinstance(rated.get("page"), str)):
            raise UserError(f"{file}: not ratings that a page of `minisft compare` saved; name such a file")
        if (key := by_page.get(rated["page"])) is None:
            raise UserError(f"{file}: rates page {SHORT.repr(rated['page'])}, whose key is not among --key; give the "
                            ".key.json that was written beside the page")
        used[key["page"]] = key
        pairs = {str(i): pair for i, pair in enumerate(key["pairs"])}
        for index, choice in rated["ratings"].items():
            if index not in pairs or choice not in ("left", "right", "tie"):
                raise UserError(f"{file}: rating {printable(index, 20)}: {SHORT.repr(choice)} does not fit this page; "
                                "a choice is left, right or tie")
            pair = pairs[index]
            score = 0.5 if choice == "tie" else float((choice == "left") == (pair["left"] == "a"))
            models, score = _in_order(key["model_a"], key["model_b"], score)
            found[models][pair["question_id"], 0].append(score)
    for key in used.values():
        for question in key["identical"]:
            found[_in_order(key["model_a"], key["model_b"], 0.5)[0]][question, 0].append(0.5)
    return found


def _read_key(file: Path) -> dict[str, Any]:
    key = _json_object(file)
    try:
        numbers = [*(pair["question_id"] for pair in key["pairs"]), *key["identical"]]
        fits = (all(isinstance(key[name], str) for name in ("page", "model_a", "model_b"))
                and all(isinstance(key[name], list) for name in ("pairs", "identical"))
                and all(pair["left"] in ("a", "b") for pair in key["pairs"])
                and all(isinstance(number, int | str) for number in numbers))
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{file}: not a page's key; give the .key.json that was written beside the page")
    return key


def _json_object(file: Path) -> dict[str, Any]:
    found = [record for _, record in json_lines(file)]
    if len(found) != 1:
        raise UserError(f"{file}: must hold one JSON object")
    return found[0]


def read_judgments(file: Path) -> tuple[Verdicts, dict[str, list[float]], int]:
    """Verdicts, the scores of each model (if the file has scores), and the number of lines left out."""
    pairs: dict[Any, dict[Unit, list[float]]] = defaultdict(lambda: defaultdict(list))
    scores: dict[Any, dict[Unit, list[float]]] = defaultdict(lambda: defaultdict(list))
    line = left_out = 0
    for line, record in json_lines(file):
        question, turn = record.get("question_id"), record.get("turn", 1)
        if not isinstance(question, int | str) or not isinstance(turn, int):
            raise UserError(f"{file}:{line}: needs question_id, and turn as a number")
        found, read = (pairs, _pairwise) if "g1_winner" in record else (scores, _single)
        if (verdict := read(record, f"{file}:{line}")) is None:
            left_out += 1
        else:
            found[verdict[0]][question, turn].append(verdict[1])
    if not line:
        raise UserError(f"{file}: holds no verdicts")
    for a, b in combinations(sorted(scores), 2):
        for unit in scores[a].keys() & scores[b].keys():
            gap = mean(scores[a][unit]) - mean(scores[b][unit])
            pairs[a, b][unit].append(0.5 if abs(gap) <= TIE + 1e-9 else float(gap > 0))
    return pairs, {model: [mean(each) for each in units.values()] for model, units in scores.items()}, left_out


def _pairwise(record: dict[str, Any], where: str) -> tuple[Any, float] | None:
    """The two models in order and the verdict; None without one."""
    one, two, winners = record.get("model_1"), record.get("model_2"), (record["g1_winner"], record.get("g2_winner"))
    for winner in winners:
        if winner not in ("model_1", "model_2", "tie", "error"):
            raise UserError(f"{where}: a winner is model_1, model_2, tie or error, not {SHORT.repr(winner)}")
    if not isinstance(one, str) or not isinstance(two, str) or one == two:
        raise UserError(f"{where}: model_1 and model_2 must be the names of two models, not {SHORT.repr((one, two))}")
    if "error" in winners:
        return None
    first = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5}[winners[0]] if winners[0] == winners[1] else 0.5
    return _in_order(one, two, first)


def _in_order(one: str, two: str, first: float) -> tuple[tuple[str, str], float]:
    """The names of two models in one order, and the verdict on the first of them; pages (A, B) and (B, A) are one."""
    return ((one, two), first) if one < two else ((two, one), 1 - first)


def _single(record: dict[str, Any], where: str) -> tuple[Any, float] | None:
    model, score = record.get("model"), record.get("score", nan)
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if not isinstance(model, str) or not (is_number and isfinite(score)):
        raise UserError(f"{where}: needs g1_winner and g2_winner (pairwise), or model and a score that is a number")
    return None if score == -1 else (model, float(score))


def win_rates(pairs: Verdicts) -> list[dict[str, Any]]:
    """A line of figures for each pair of models and, if there are several turns, for each turn."""
    lines = []
    for (a, b), verdicts in sorted(pairs.items()):
        turns = sorted({turn for _, turn in verdicts})
        for turn in [None, *turns] if len(turns) > 1 else [None]:
            found = [mean(each) for (_, at), each in verdicts.items() if turn is None or at == turn]
            wins, losses = sum(one > 0.5 for one in found), sum(one < 0.5 for one in found)
            lines.append({"model_a": a, "model_b": b, "turn": turn, "wins": wins, "ties": len(found) - wins - losses,
                          "losses": losses, "win_rate": rate(found), "p": sign_test(wins, losses)})
    return lines


def describe(lines: list[dict[str, Any]], scores: dict[str, list[float]] | None = None, left_out: int = 0) -> str:
    """Win rates and mean scores as text."""
    text = []
    for line in lines:
        text.append(f"{line['model_a']} against {line['model_b']}"
                    + (f", turn {line['turn']}" if line["turn"] is not None else ""))
        text.append(f"  won {line['wins']}, tied {line['ties']}, lost {line['losses']}; win rate, ties split: "
                    f"{percent(line['win_rate'])}; sign test p = {line['p']:.3g}")
    text += [f"{model}: mean score {mean(each):.2f} of {len(each)}" for model, each in sorted((scores or {}).items())]
    if left_out:
        text.append(f"{left_out} lines without a verdict were left out")
    return "\n".join(printable(line, PATH) for line in text)
