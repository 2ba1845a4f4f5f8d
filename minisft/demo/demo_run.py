"""The default job, `torchrun train.py`: what supervised fine-tuning is, in a few minutes on a CPU.

    world.tsv -> articles about all countries  -> recipe demo-base: a base model that has read them
              -> questions about half of them  -> recipe demo: the base model, fine-tuned to answer
              -> the same questions about the other half -> what does the base say, what the tuned model?

The tuned model answers questions about facts that it only ever saw as plain text: fine-tuning taught it to answer; the
knowledge was already there.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

from minisft import config_io
from minisft.config import Config
from minisft.data.chat import Renderer
from minisft.data.conversation import Turn
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.demo import bpe, world
from minisft.errors import UserError
from minisft.generate.assistant import generate
from minisft.model.llama_config import LlamaConfig
from minisft.pretrained import from_pretrained
from minisft.runs.failure import guarded
from minisft.runs.lifecycle import train
from minisft.training.parallel import launched_rank

COUNTRIES = 96  # of the 189 in world.tsv: what a small model learns in two minutes on two cores
VOCABULARY = 2048
ARTICLES_PER_COUNTRY = 40  # in each language
QUESTIONS_PER_FACT = 2
ASKED = 200  # held-out questions in the final score
SHOWN = 6


def main(argv: list[str]) -> int:
    """Run both recipes and print the comparison; `argv` overrides keys of the second. Returns the exit code."""
    return guarded(lambda: _demo(argv))


def _demo(argv: list[str]) -> int:
    tuned = config_io.load(["demo", *argv])
    if not tuned.run.export:
        raise UserError("run.export = false: the demo ends with questions to the model that it exports; set it to true")
    base = config_io.load(["demo-base", "--train.seed", str(tuned.train.seed)])
    if (Path(base.run.dir) / "final").exists():
        kept = config_io.load([f"{base.run.dir}/config.toml"])
        if kept != base:
            raise UserError(f"{base.run.dir}: holds a base model with other settings (seed {kept.train.seed}); delete "
                            "it, or run the demo in another folder")
        _say(f"{base.run.dir}: using the base model that is there")
    else:
        _say(f"{base.model.tokenizer}: writing articles about {COUNTRIES} countries and questions about half of them")
        write_world(Path(base.model.tokenizer), countries=COUNTRIES, seed=base.train.seed)
        _say("recipe demo-base: a model with random weights reads the articles")
        if code := train(base):
            return code
    if (Path(tuned.run.dir) / "final").exists() and not argv:
        _say(f"{tuned.run.dir}: already trained; delete it to train again")
    else:
        _say("recipe demo: the base model is fine-tuned on the questions")
        if code := train(tuned):
            return code
    if launched_rank()[0] == 0:
        print(compare(base, tuned, Path(base.model.tokenizer)))
    return 0


def _say(text: str) -> None:
    if launched_rank()[0] == 0:
        print(text, flush=True)


def write_world(folder: Path, *, countries: int, seed: int) -> None:
    """Write the files that the two recipes name. Every process writes the same bytes, each file in one rename."""
    facts = random.Random(seed).sample(world.load_world(), countries)
    asked, heldout = world.halves(facts, seed)
    articles = world.articles(facts, per_country=ARTICLES_PER_COUNTRY, seed=seed)
    questions = world.questions(asked, per_fact=QUESTIONS_PER_FACT, seed=seed)
    files = {"articles": articles, "questions": questions,
             "questions-1": questions[::2], "questions-2": questions[1::2],  # for recipes round-1 and round-2
             "heldout-questions": world.questions(heldout, per_fact=1, seed=seed)[:ASKED],
             "heldout-articles": world.articles(heldout, per_country=1, seed=seed + 1)[:ASKED]}
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    bpe.train_tokenizer((row["text"] for row in articles), VOCABULARY, partial)
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    shape = LlamaConfig(vocab_size=Tokenizer(partial).vocab_size, hidden_size=128, intermediate_size=344,
                        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, head_dim=32,
                        rope_theta=10_000.0, tie_word_embeddings=True, max_position_embeddings=512,
                        initializer_range=0.04)
    (partial / "config.json").write_text(json.dumps(shape.to_dict(dtype="float32"), indent=2))
    folder.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        os.replace(file, folder / file.name)
    partial.rmdir()


def answers(folder: Path, rows: list[dict[str, str]]) -> tuple[list[str], float]:
    """Greedy answers of the model in `folder`, and the share of them that is exactly right."""
    tokenizer = Tokenizer(folder)
    renderer = Renderer(load_templates()["llama3"], tokenizer)
    prompts = [renderer.prompt((Turn("user", row["prompt"]),)) for row in rows]
    said = generate(from_pretrained(folder), prompts, max_new_tokens=24, stop_ids=renderer.stop_ids())
    texts = [tokenizer.decode(ids) for ids in said]
    return texts, world.exact_match(texts, [row["completion"] for row in rows])


def compare(base: Config, tuned: Config, folder: Path) -> str:
    """The base model and the tuned one, asked about countries that fine-tuning never mentioned."""
    def records(file: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    rows = records(folder / "heldout-questions.jsonl")
    _say(f"asking both models {len(rows)} questions about the other half of the countries")
    (before, base_score), (after, score) = (answers(Path(config.run.dir) / "final", rows) for config in (base, tuned))
    lines = ["", "Countries that the fine-tuning never mentioned:"]
    for row, base_text, tuned_text in list(zip(rows, before, after, strict=True))[:SHOWN]:
        mark = "right" if tuned_text.strip() == row["completion"] else f"expected: {row['completion']}"
        lines += [f"  {row['prompt']}", f"    base   {base_text.strip()!r}",
                  f"    tuned  {tuned_text.strip()!r} ({mark})"]
    text = [record for record in records(Path(tuned.run.dir) / "metrics.jsonl")
            if record["kind"] == "eval" and record["name"] == "heldout-articles"]
    lines += ["", f"exact answers to {len(rows)} held-out questions: base {base_score:.1%}, tuned {score:.1%}"]
    if text:  # not after `--data.general ""`
        lines += [f"loss on plain text: base {text[0]['loss']:.3f}, tuned {text[-1]['loss']:.3f} nats a token"]
    return "\n".join(lines)
