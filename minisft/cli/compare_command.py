"""`minisft compare`: a page for blind ratings of two models, and win rates of ratings or of a judge."""

import argparse
import json
from pathlib import Path

from minisft.cli.answer_command import add_answer_options, answer
from minisft.cli.options import natural
from minisft.errors import PATH, UserError, printable
from minisft.reports.page import check_outputs, write, write_json


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The options of `minisft compare`."""
    command = commands.add_parser(
        "compare", help="a page for blind ratings of two models; win rates of ratings or of a judge",
        usage="minisft compare A B --questions FILE --out PAGE.html [options]\n"
              "       minisft compare --ratings FILE ... --key PAGE.html.key.json\n"
              "       minisft compare --judge FILE", allow_abbrev=False,
        epilog="Give the page to the rater and keep the key, which says whose answers are where.")
    command.add_argument("models", nargs="*", metavar="A B", help="model folders, or files that `minisft answer` wrote")
    command.add_argument("--questions", metavar="FILE", help="mt-en or mt-tr (shipped), or a file in FastChat's or "
                         "IFEval's layout")
    command.add_argument("--out", type=Path, metavar="FILE", help="the page; its key and the answers of model folders "
                         "are written beside it")
    command.add_argument("--seed", type=natural, default=0, metavar="N", help="of the hidden order (0)")
    command.add_argument("--ratings", nargs="+", type=Path, default=[], metavar="FILE", help="saved by the page")
    command.add_argument("--key", nargs="+", type=Path, default=[], metavar="FILE", help="of the rated pages")
    command.add_argument("--judge", type=Path, metavar="FILE", help="verdicts in FastChat's layout, of pairs or scores")
    add_answer_options(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Do one of three: make a page, read ratings, read a judge's verdicts."""
    from minisft.evals import comparison
    from minisft.evals.prompts import prompt_file

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


def make_page(options: argparse.Namespace, beside: dict[str, Path]) -> None:
    """Write the answers of both models, the page and its key."""
    from minisft.evals.answers import read_answers
    from minisft.evals.comparison import blind_page
    from minisft.evals.prompts import load_prompts

    if len(options.models) != 2 or not options.questions or not options.out:
        raise UserError("a page needs two models, --questions FILE and --out PAGE.html")
    if options.json:
        raise UserError("--json: a page has no figures; they come with --ratings or --judge")
    prompts = load_prompts(options.questions)[: options.limit]
    a, b = (answer(model, prompts, beside[f"{side}.jsonl"], options)[0] if Path(model).is_dir() else
            read_answers(Path(model)) for model, side in zip(options.models, "ab", strict=True))
    page, key = blind_page(prompts, a, b, seed=options.seed)
    write(beside["key.json"], json.dumps(key, indent=1, ensure_ascii=False) + "\n")
    write(options.out, page)
    lacking = len(prompts) - len(key["pairs"]) - len(key["identical"])
    print(f"{printable(options.out, PATH)}: {len(key['pairs'])} pairs to rate; {len(key['identical'])} with the same "
          f"answers, which are ties; {lacking} questions that one of the two has not answered")
    print(f"{printable(beside['key.json'], PATH)}: whose answers are where; not for the rater")
