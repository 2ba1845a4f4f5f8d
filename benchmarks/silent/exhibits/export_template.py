"""The exported model has no chat template, or another one than it was trained with.

Whoever serves the folder must guess the format, and takes the base's or none at all: the model is asked in another
format than it was taught. Reported: LLaMA-Factory#10396.
"""

import json
from difflib import SequenceMatcher

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from silent.world import IGNORED, Job, Trainer, Verdict, World, judged, said

FAULT, UNIT = "no_template", "tokens"
TALK = said("  What lies behind the old harbour?", "A row of boats, and one of them is red.")


def look(trainer: Trainer, world: World) -> Verdict:
    """Render a conversation with what the folder has, and compare with the tokens that were trained."""
    folder = trainer.train(Job((TALK,), lr=1e-3), world).folder
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    beside = folder / "chat_template.jinja"
    template = beside.read_text() if beside.exists() else settings.get("chat_template")
    if not template:
        return Verdict("wrong", "no chat template in the folder", float(len(trainer.rows(Job((TALK,)), world)[0].ids)))
    for tag in ("generation", "endgeneration"):  # transformers' own tags, which write nothing
        for left, right in (("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}"), ("{%", "%}")):
            template = template.replace(f"{left} {tag} {right}", f"{left} if true {right}" if tag == "generation"
                                        else f"{left} endif {right}")
    bos = settings.get("bos_token") or ""
    text = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        messages=TALK["messages"], bos_token=bos if isinstance(bos, str) else bos["content"],
        eos_token=settings.get("eos_token"))
    served = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    row = trainer.rows(Job((TALK,), length=256), world)[0]
    last = max(i for i, label in enumerate(row.labels) if label != IGNORED)
    trained = row.ids[: last + 1]  # what follows the answer is neither asked nor learned
    same = sum(block.size for block in SequenceMatcher(None, served, trained, autojunk=False).get_matching_blocks())
    wrong = max(len(served), len(trained)) - same
    return judged(wrong, f"{wrong} tokens differ between what is served ({len(served)}) and what was trained "
                         f"({len(trained)})")
