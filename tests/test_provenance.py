"""A model's folder says where it came from, through all rounds, and its card has the run's real figures."""

import hashlib
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
from small_runs import HERE, log, options, train

import minisft
from minisft.export.provenance import commit, model_card, model_name, start_record
from minisft.runs.lifecycle import main

CONVERSATIONS = HERE / "oracles" / "conversations.jsonl"


def record_of(folder):
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rounds(base, tmp_path_factory):
    """Two rounds on different halves of the conversations, by the shipped recipes; and an intermediate export."""
    folder = tmp_path_factory.mktemp("rounds")
    lines = CONVERSATIONS.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("first", lines[:8]), ("second", lines[8:16]), ("held", lines[16:20])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    (folder / "text|1.jsonl").write_text(json.dumps({"text": "The mill turns when the river rises."}) + "\n")
    shared = {"data.seq_len": 512, "data.cache": folder / "cache", "train.max_steps": 2, "batch.packs": 1,
              "train.precision": "fp32", "data.eval": folder / "held.jsonl", "data.general": folder / "text|1.jsonl"}
    for number, name, path in ((1, "first", base), (2, "second", folder / "round-1" / "final")):
        settings = {**shared, "model.path": path, "data.train": folder / f"{name}.jsonl",
                    "data.replay": folder / "first.jsonl" if number == 2 else "",
                    "run.dir": folder / f"round-{number}", "checkpoint.export_every": number - 1}
        given = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        assert main([f"round-{number}", *given]) == 0
    return folder


def test_the_chain_of_rounds(rounds, base):
    """round-2/final -> round-1/final -> the base model, which has no record."""
    second, first = record_of(rounds / "round-2/final"), record_of(rounds / "round-1/final")
    assert second["base"]["training"] == first
    assert second["base"]["name"] == "round-1"
    assert second["base"]["path"] == str(rounds / "round-1/final")
    assert second["base"]["config"] == json.loads((rounds / "round-1/final/config.json").read_text())
    assert first["base"]["path"] == str(base)
    assert first["base"]["config"] == json.loads((base / "config.json").read_text())
    assert "training" not in first["base"]


def test_the_content_of_the_record(rounds):
    record, run = record_of(rounds / "round-1/final"), rounds / "round-1"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in lines if r["kind"] == "train"]
    assert record["recipe"] == (run / "config.toml").read_text()
    assert (record["steps"], record["total_steps"], record["ranks"], record["seed"]) == (2, 2, 1, 0)
    assert (record["minisft"], record["torch"]) == (minisft.__version__, torch.__version__)
    for name in ("tokens", "target_tokens", "seconds"):
        assert record[name] == pytest.approx(sum(r[name] for r in steps))
    assert record["final_loss"] == steps[-1]["loss"]
    source, = record["data"]["train"]
    assert source["file"] == "first.jsonl"
    assert source["sha256"] == hashlib.sha256((rounds / "first.jsonl").read_bytes()).hexdigest()
    assert source["documents"] == 8
    assert [record["data"][use][0]["file"] for use in ("eval", "general")] == ["held.jsonl", "text|1.jsonl"]
    for name, found in record["losses"].items():
        records = [r for r in lines if r["kind"] == "eval" and r["name"] == name]
        assert (found["before"], found["after"], found["step"]) == (records[0]["loss"], records[-1]["loss"], 2)
        assert found.get("forgetting") == records[-1].get("forgetting")
    assert record["losses"].keys() == {"held", "text|1"}


def test_an_intermediate_export_records_its_own_step(rounds):
    record = record_of(rounds / "round-2/exports/step-000001")
    assert (record["steps"], record["total_steps"]) == (1, 2)
    assert "# round-2-step-000001\n" in (rounds / "round-2/exports/step-000001/README.md").read_text()


def test_the_card_is_the_hub_s_and_has_the_figures(rounds, base):
    hub = pytest.importorskip("huggingface_hub")
    text = (rounds / "round-2/final/README.md").read_text(encoding="utf-8")
    card = hub.ModelCard(text)
    assert card.data.to_dict() == {"base_model": "round-1", "library_name": "transformers", "tags": ["minisft", "sft"],
                                   "pipeline_tag": "text-generation"}
    record = record_of(rounds / "round-2/final")
    for found in record["losses"].values():
        assert f" {found['before']:.4f} | {found['after']:.4f} | 2 |" in text
    assert f"| {record['losses']['text|1']['forgetting']:+.4f} |" in text
    source, = record["data"]["train"]
    assert (f"| `second.jsonl` | train | 8 | {source['tokens']:,} | {source['target_tokens']:,} | 1 | "
            f"`{source['sha256'][:12]}` |") in text
    trained = record_of(rounds / "round-1/final")["target_tokens"]
    recipe = tomllib.loads((rounds / "round-2/config.toml").read_text())
    assert f"| optim.lr | `{recipe['optim']['lr']}` |" in text
    assert f"- `round-1`: 2 steps, {trained:,} trained tokens, on `first.jsonl`\n- `{base.name}`: the first" in text
    rows = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("| ")]
    held = [row for row in rows if row.startswith(("| `held` |", "| `text1` |"))]
    assert len(held) == 2
    assert {row.count("|") for row in held} == {9}  # a bar in a name is no cell


def test_no_folder_of_this_machine_is_in_the_card(rounds, base):
    text = (rounds / "round-2/final/README.md").read_text(encoding="utf-8")
    for path in (rounds, base, HERE, Path.home()):
        assert str(path) not in text


def test_random_weights_have_no_base(base, tmp_path):
    train(base, tmp_path, model__path="", model__init="random", model__config=base / "config.json",
          model__tokenizer=base, train__max_steps=1, batch__packs=1)
    assert record_of(tmp_path / "run/final")["base"] is None
    text = (tmp_path / "run/final/README.md").read_text()
    assert "base_model" not in text
    assert "Random weights, trained with minisft" in text


@pytest.mark.parametrize(("content", "message"), [
    ("{", "not readable (JSONDecodeError: "), ("[1]", "not readable (TypeError: expected a JSON object, found list);"),
    ('{"minisft": "0.1.0", "steps": 3}', "not readable (KeyError: 'data'); the new model's training.json will hold"),
    ("[" * 100_000, "not readable (RecursionError: "), ("\udcff", "not readable (UnicodeDecodeError: ")])
def test_a_broken_record_of_the_base_is_refused_before_the_run(base, tmp_path, capsys, content, message):
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "training.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    assert main(options(tmp_path, tmp_path)) == 2
    assert f"training.json: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


HOSTILE = ("\n# Heading\n", "<script>alert(1)</script>", "[link](http://evil.example)", "`` ` ```", "a | b", "![i](x)",
           "http://evil.example", "</table><h1>", "\x1b[2J\x07", "\ud800", "\u202e", "| --- |", "", " ", "x" * 10**5,
           "\n```\n# after the fence", "*a* _b_ ~~c~~", "&lt;&#60;", "\\", "$(touch was_here)", "'; touch was_here; '")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_foreign_name_is_only_itself_in_the_card(rounds, tmp_path, name):
    """The card has the same elements as with a plain name, wherever the name stands; a shell sees one word."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False}).render

    def card(name):
        record = record_of(rounds / "round-2/final")
        source = {**record["data"]["train"][0], "file": name}
        earlier = {**record["base"]["training"], "data": {"train": [source] * 30, "replay": []},
                   "base": {"name": name, "path": name}}
        return model_card(name, {**record, "base": {"name": name, "path": name, "training": earlier}, "losses": {
            name: record["losses"]["held"]}, "data": {"train": [source], "eval": []}})
    text = card(name)
    text.encode()
    front = text.split("\n---\n")[0]
    assert front.count("\n") == card("plain").split("\n---\n")[0].count("\n")
    elements = [re.findall(r"</?\w+", markdown(found[len(found.split("\n---\n")[0]) + 5:])) for found in (
        text, card("plain"))]
    assert elements[0] == elements[1]
    assert all(char.isprintable() or char == "\n" for char in text)
    assert len(text) < 12_000
    command = next(line for line in text.splitlines() if line.startswith("vllm serve"))
    words = subprocess.run(["sh", "-c", f"vllm() {{ printf '%s\\n' \"$#\"; }}; {command}"], capture_output=True,
                           text=True, cwd=tmp_path)
    assert (words.stdout, words.stderr, [*tmp_path.iterdir()]) == ("4\n", "", [])


def test_a_record_of_another_program_is_kept_and_not_read(base, tmp_path):
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "training.json").write_text('{"trainer": "another"}')
    train(tmp_path, tmp_path, train__max_steps=1, batch__packs=1)
    assert record_of(tmp_path / "run/final")["base"]["training"] == {"trainer": "another"}
    assert "## Earlier rounds" not in (tmp_path / "run/final/README.md").read_text()


def test_the_commit_is_git_s(tmp_path):
    """The checkout's; with -dirty if a file differs; empty for a package inside another project's repository."""
    def git(*arguments):
        return subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
                              capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "file").write_text("one")
    assert commit(tmp_path) == ""
    git("init"), git("add", "file"), git("commit", "-m", "one")
    assert commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
    (tmp_path / "site-packages").mkdir()
    assert commit(tmp_path / "site-packages") == ""


@pytest.mark.parametrize(("folder", "name"), [
    ("/a/runs/mine/final", "mine"), ("/a/Llama", "Llama"), ("/a/mine/exports/step-000100", "mine-step-000100"),
    ("/final", "final")])
def test_names_of_models(folder, name):
    assert model_name(Path(folder)) == name


def test_the_base_in_the_start_record(base):
    assert start_record("")["base"] is None
    assert start_record(str(base))["base"]["name"] == base.name


def test_the_card_stands_without_held_out_data(base, tmp_path):
    train(base, tmp_path, train__max_steps=1, batch__packs=1)
    record = record_of(tmp_path / "run/final")
    assert record["losses"] == {}
    assert "## Held-out losses" not in model_card("x", record)
    assert record["steps"] == len(log(tmp_path))
