"""`minisft eval`: what a model knows and does, in figures."""

import tempfile
from argparse import Namespace
from dataclasses import replace
from typing import Any

from minisft import config_io
from minisft.cli.loading import load, precision_of
from minisft.errors import UserError
from minisft.evals import choices, heldout, instructions
from minisft.evals.questions import prompt_file
from minisft.reports.page import check_outputs, write_json


def run(options: Namespace) -> None:
    """All evaluations that the options ask for, of one model."""
    check_outputs({"--json": options.json},
                  (options.model, options.templates, *options.choices, *options.shots_from, *options.data,
                   options.instructions and prompt_file(options.instructions)))
    if not (options.choices or options.instructions or options.data):
        raise UserError("nothing to evaluate; give --choices FILE ..., --instructions FILE or --data FILE ...")
    # All files are read before the weights: an error in them should not take a minute.
    questions = choices.load(options.choices, format=options.format, language=options.language, style=options.style,
                             shots=options.shots, shots_from=options.shots_from, limit=options.limit)
    asked = instructions.load(options.instructions, skip_unknown=options.skip_unknown,
                              limit=options.limit) if options.instructions else None
    keys = [f"--{key}={value}" for key, value in vars(options).items() if key[:5] == "data." and value is not None]
    data = config_io.load(["--model.path=-", "--data.train=-", *keys]).data
    # A base model has no chat template, and needs none for plain text.
    template = "" if options.chat or asked or options.data else "text"
    assistant = load(options.model, options, template=template)
    found: dict[str, Any] = {"model": options.model, "precision": precision_of(options)}
    if questions:
        found["choices"] = choices.figures(assistant, questions, chat=options.chat, batch_tokens=options.batch_tokens)
        print(choices.describe(found["choices"]))
    if asked:
        found["instructions"] = instructions.figures(assistant, asked, max_new_tokens=options.max_new_tokens)
        print(instructions.describe(found["instructions"]))
    if options.data:
        with tempfile.TemporaryDirectory() as cache:
            found["losses"] = heldout.file_losses(assistant, options.data, replace(data, cache=cache))
        print(heldout.describe(found["losses"]))
    if options.json:
        write_json(options.json, found)
