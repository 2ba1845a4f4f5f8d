"""`minisft compare`: a page for blind ratings of two models, and win rates of ratings or of a judge."""

import json
from argparse import Namespace
from pathlib import Path

from minisft.cli.answer_command import answer
from minisft.errors import PATH, UserError, printable
from minisft.evals import comparison
from minisft.evals.answers import read_answers
from minisft.evals.questions import load_prompts, prompt_file
from minisft.reports.page import check_outputs, write, write_json


def run(options: Namespace) -> None:
    """Do one of three: make a page, read ratings, read a judge's verdicts."""
    # Answers of model folders, and the key, are kept beside the page.
    beside = {name: options.out and options.out.parent / f"{options.out.name}.{name}"
              for name in ("a.jsonl", "b.jsonl", "key.json")}
    answered = {f"--out, its answers of {side}:": beside[f"{side}.jsonl"]
                for model, side in zip(options.models, "ab", strict=False) if options.out and Path(model).is_dir()}
    check_outputs({"--out": options.out, "--json": options.json, "--out, its key:": beside["key.json"], **answered},
                  (*options.models, options.questions and prompt_file(options.questions), options.templates,
                   *options.ratings, *options.key, options.judge), appended=answered)
    if sum(map(bool, (options.models, options.ratings, options.judge))) != 1:
        raise UserError("give two models, or --ratings, or --judge; `minisft compare --help` shows each")
    if options.models:
        return make_page(options, beside)
    scores: dict[str, list[float]] = {}
    left_out = 0
    if options.judge:
        pairs, scores, left_out = comparison.read_judgments(options.judge)
    else:
        pairs = comparison.read_ratings(options.ratings, options.key)
    lines = comparison.win_rates(pairs)
    print(comparison.describe(lines, scores, left_out) or "nothing is rated")
    if options.json:
        write_json(options.json, {"pairs": lines, "scores": scores, "left_out": left_out})


def make_page(options: Namespace, beside: dict[str, Path]) -> None:
    """Write the answers of both models, the page and its key."""
    if len(options.models) != 2 or not options.questions or not options.out:
        raise UserError("a page needs two models, --questions FILE and --out PAGE.html")
    if options.json:
        raise UserError("--json: a page has no figures; they come with --ratings or --judge")
    prompts = load_prompts(options.questions)[: options.limit]
    a, b = (answer(model, prompts, beside[f"{side}.jsonl"], options)[0] if Path(model).is_dir() else
            read_answers(Path(model)) for model, side in zip(options.models, "ab", strict=True))
    page, key = comparison.blind_page(prompts, a, b, seed=options.seed)
    write(beside["key.json"], json.dumps(key, indent=1, ensure_ascii=False) + "\n")
    write(options.out, page)
    lacking = len(prompts) - len(key["pairs"]) - len(key["identical"])
    print(f"{printable(options.out, PATH)}: {len(key['pairs'])} pairs to rate; {len(key['identical'])} with the same "
          f"answers, which are ties; {lacking} questions that one of the two has not answered")
    print(f"{printable(beside['key.json'], PATH)}: whose answers are where; not for the rater")
