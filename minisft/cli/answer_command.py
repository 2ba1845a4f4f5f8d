"""`minisft answer`: a model's answers to a file of questions, for judges, and their signals."""

from argparse import Namespace
from pathlib import Path

from minisft.cli.loading import load
from minisft.errors import PATH, printable
from minisft.evals import answers, questions
from minisft.generate.assistant import Assistant
from minisft.reports.page import check_outputs, write_json


def run(options: Namespace) -> None:
    """Answer, then describe the answers."""
    check_outputs({"--out": options.out, "--json": options.json},
                  (questions.prompt_file(options.questions), options.model, options.templates), appended=("--out",))
    prompts = questions.load_prompts(options.questions)[: options.limit]
    found, assistant = answer(options.model, prompts, options.out, options, model_id=options.model_id,
                              always_load=options.flips)
    figures = answers.signals((turn for turns in found.turns.values() for turn in turns), found.all_cut)
    flips = answers.flip_figures(assistant, batch=options.batch, max_new_tokens=min(64, options.max_new_tokens)
                                 ) if options.flips and assistant else None
    print(f"{printable(options.out, PATH)}: {printable(found.model_id)}, {len(found.turns)} questions")
    print(answers.describe(figures, flips))
    if options.json:
        write_json(options.json, {"model": found.model_id, "signals": figures, "flips": flips})


def answer(model: str, prompts: list[questions.Prompt], file: Path, options: Namespace, *, model_id: str = "",
           always_load: bool = False) -> tuple[answers.Answers, Assistant | None]:
    """A model folder's answers, after adding to `file` what it lacks; and the model, if it was loaded for that."""
    model_id, assistant = model_id or answers.model_name(model), None
    with answers.locked(file):
        if always_load or answers.unanswered(prompts, file, model_id=model_id):
            assistant = load(model, options)
            answers.write_answers(assistant, prompts, file, model_id=model_id, batch=options.batch,
                                  max_new_tokens=options.max_new_tokens)
        return answers.read_answers(file), assistant
