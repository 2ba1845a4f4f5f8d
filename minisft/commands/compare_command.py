"""`minisft compare`: a page for blind ratings of two models, and win rates of ratings or of a judge."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.commands import answer_command
from minisft.commands.numbers import natural, positive
from minisft.errors import PATH, UserError, printable
from minisft.reports.page import check_outputs, write_json

if TYPE_CHECKING:
    from minisft.evaluation.answers import Answers
    from minisft.evaluation.prompts import Question


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
    command.add_argument("--out", type=Path, metavar="FILE", help="the page; its key is written beside it, and so are "
                         "the answers of model folders")
    command.add_argument("--seed", type=natural, default=0, metavar="N", help="of the hidden order (0)")
    command.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    command.add_argument("--ratings", nargs="+", type=Path, default=[], metavar="FILE", help="saved by the page")
    command.add_argument("--key", nargs="+", type=Path, default=[], metavar="FILE", help="of the rated pages")
    command.add_argument("--judge", type=Path, metavar="FILE", help="verdicts in FastChat's layout, of pairs or scores")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    answer_command.add_model_options(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """One of three: make a page, read ratings, read a judge's verdicts."""
    from minisft.evaluation import comparison, prompts

    out, asked = options.out, options.questions and prompts.question_file(options.questions)
    answered = {f"--out, its answers of {side}:": answers_beside(out, side)
                for model, side in zip(options.models, "ab", strict=False) if out and Path(model).is_dir()}
    key = out and comparison.key_file(out)
    check_outputs({"--out": out, "--json": options.json, "--out, its key:": key, **answered},
                  (*options.models, asked, options.templates, *options.ratings, *options.key, options.judge),
                  appended=answered)
    if sum(map(bool, (options.models, options.ratings, options.judge))) != 1:
        raise UserError("give two models, or --ratings, or --judge; `minisft compare --help` shows each")
    if options.models:
        return make_page(options)
    from minisft.evaluation import ratings

    scores: dict[str, list[float]] = {}
    left_out = 0
    if options.judge:
        pairs, scores, left_out = ratings.read_judgments(options.judge)
    else:
        pairs = ratings.read_ratings(options.ratings, options.key)
    lines = ratings.table(pairs)
    print(ratings.describe(lines, scores, left_out) or "nothing is rated")
    if options.json:
        write_json(options.json, {"pairs": lines, "scores": scores, "left_out": left_out})


def make_page(options: argparse.Namespace) -> None:
    """Answers of both, the page and its key."""
    from minisft.evaluation import comparison, prompts

    if len(options.models) != 2 or not options.questions or not options.out:
        raise UserError("a page needs two models, --questions FILE and --out PAGE.html")
    if options.json:
        raise UserError("--json: a page has no figures; they come with --ratings or --judge")
    questions = prompts.load_questions(options.questions)[: options.limit]
    a, b = (answers_of(model, questions, options, side)
            for model, side in zip(options.models, ("a", "b"), strict=True))
    key = comparison.write_page(options.out, questions, a, b, seed=options.seed)
    lacking = len(questions) - len(key["pairs"]) - len(key["identical"])
    print(f"{printable(options.out, PATH)}: {len(key['pairs'])} pairs to rate; {len(key['identical'])} with the same "
          f"answers, which are ties; {lacking} questions that one of the two has not answered")
    print(f"{printable(comparison.key_file(options.out), PATH)}: whose answers are where; not for the rater")


def answers_beside(page: Path, side: str) -> Path:
    """Where the answers of a model folder are kept."""
    return page.parent / f"{page.name}.{side}.jsonl"


def answers_of(model: str, questions: "list[Question]", options: argparse.Namespace, side: str) -> "Answers":
    """The answers in a file, or those of a model folder, which are kept beside the page."""
    from minisft.evaluation import answers

    if not Path(model).is_dir():
        return answers.read_answers(Path(model))
    file, name = answers_beside(options.out, side), answers.model_name(model)
    with answers.alone(file):
        if answers.unanswered(questions, file, model_id=name):
            answers.write_answers(answer_command.load(model, options), questions, file, model_id=name,
                                  max_new_tokens=options.max_new_tokens, batch=options.batch)
        return answers.read_answers(file)
