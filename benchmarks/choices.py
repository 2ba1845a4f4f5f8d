"""Multiple choice against lm-evaluation-harness: the same model and questions, compared by log-likelihood.

    python benchmarks/choices.py MODEL FILE... [--style letter|text] [--shots K] [--limit N] [--chat] [--json FILE]

lm-evaluation-harness runs its own tasks with its own prompts: mmlu_* and turkishmmlu_* for `letter`, arc_easy for
`text`. Only their data are replaced, by what Python's csv and json read from each FILE: MMLU's CSV with a header row,
TurkishMMLU's JSON, or with `--style text` ARC's JSON lines. If questions serve as each other's shots, both take the
first other questions of the file. Both compute in fp32, lm-evaluation-harness with one request a batch. With `--chat`
the harness puts its description into a system turn and minisft into the first user turn, so `--chat` takes files
without a description: TurkishMMLU's, or any as `text`.
"""

import argparse
import csv
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minisft.evals import choices
from minisft.generate.assistant import Assistant

LETTERS = "ABCDE"


def task(manager: object, file: Path, style: str, folder: Path) -> dict:
    """Return lm-evaluation-harness's task for `file`, with the questions rewritten to the fields that it reads."""
    if file.suffix == ".csv":
        with open(file, newline="", encoding="utf-8") as text:
            rows = list(csv.DictReader(text))
        names = [name for name in rows[0] if name.startswith("choice")]
        found = [(row["question"], [row[name] for name in names], int(row["answer"])) for row in rows]
        name = f"mmlu_{file.stem.removesuffix('_dev').removesuffix('_test')}"
        records = [{"question": q, "choices": c, "answer": a} for q, c, a in found]
    elif file.suffix == ".jsonl":
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found = [(q["question"], q["choices"]["text"], q["choices"]["label"].index(q["answerKey"])) for q in records]
        name = "arc_easy"
    else:
        found = [(q["question"], q["choices"], LETTERS.index(q["answer"])) for q in json.loads(file.read_bytes())]
        name = f"turkishmmlu_{file.stem.removeprefix('TurkishMMLU_').lower().replace(' ', '_')}"
        records = [{"question": q, "choices": c, "answer": LETTERS[a]} for q, c, a in found]
    if style == "text":
        name = "arc_easy"
        records = [{"question": q.strip(), "choices": {"text": c, "label": list(LETTERS[: len(c)])},
                    "answerKey": LETTERS[a]} for q, c, a in found]
    data = folder / f"{file.stem.replace(' ', '_')}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    settings = manager._index[name].cfg | {
                "task": name, "dataset_path": "json", "dataset_name": None, "test_split": "train",
                "dataset_kwargs": {"data_files": {"train": str(data)}},
                "metric_list": [{"metric": score} for score in choices.SCORES]}
    if style == "text":
        settings |= {"training_split": None, "validation_split": None, "should_decontaminate": False}
    return settings | {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n", "split": "train"}}


def harness(model: object, manager: object, file: Path, options: argparse.Namespace) -> list[dict]:
    """Return each question's log-likelihoods, and True for each score that finds the answer."""
    from lm_eval.evaluator import simple_evaluate

    with tempfile.TemporaryDirectory() as folder:
        settings = task(manager, file, options.style, Path(folder))
        found = simple_evaluate(model, tasks=[settings], num_fewshot=options.shots, limit=options.limit,
                                bootstrap_iters=0, apply_chat_template=options.chat, fewshot_as_multiturn=True)
    samples = sorted(found["samples"][settings["task"]], key=lambda sample: sample["doc_id"])
    return [{"log_likelihoods": [float(response[0]) for response in sample["filtered_resps"]],
             **{score: sample[score] for score in choices.SCORES if score in sample}} for sample in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--style", choices=choices.STYLES, default="letter")
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ("torch", "transformers", "lm_eval")
    print(f"{platform.machine()}, {torch.get_num_threads()} thread(s), " +
          ", ".join(f"{name} {version(name)}" for name in names))
    language = "en" if options.style == "text" else ""  # arc_easy's
    asked = choices.load(list(map(str, options.files)), language=language, style=options.style, shots=options.shots,
                        limit=options.limit)
    assistant = Assistant.load(options.model, template="" if options.chat else "text")
    ours = choices.figures(assistant, asked, chat=options.chat)
    model = HFLM(pretrained=options.model, dtype="float32", device="cpu", batch_size=1)
    manager = TaskManager()
    theirs = [answer for file in options.files for answer in harness(model, manager, file, options)]
    worst = max(abs(a - b) for mine, other in zip(ours["answers"], theirs, strict=True)
                for a, b in zip(mine["log_likelihoods"], other["log_likelihoods"], strict=True))
    scores = [score for score in choices.SCORES if score in theirs[0]]
    figures = {"questions": len(theirs), "choices": sum(len(answer["log_likelihoods"]) for answer in theirs),
               "largest_difference": worst}
    for score in scores:
        figures[score] = {"minisft": ours[score], "lm_eval": sum(answer[score] for answer in theirs) / len(theirs)}
        figures[f"{score}_differ"] = sum(
            (mine["chosen"][score] == mine["answer"]) != bool(other[score])
            for mine, other in zip(ours["answers"], theirs, strict=True))
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
