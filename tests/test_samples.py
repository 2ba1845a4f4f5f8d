"""Answers in the log of a run are the model's own, and a run says what it was made of."""

import json
import platform

import numpy as np
import pytest
import torch
from small_runs import HERE, log, options, train

from minisft import __version__, config_io
from minisft.__main__ import main as command
from minisft.errors import UserError
from minisft.export import provenance as on
from minisft.pretrained import from_pretrained
from minisft.reports.data_report import pack_fill
from minisft.runs.lifecycle import main

DOCUMENTS = json.loads((HERE / "oracles" / "trl_curve.json").read_text(encoding="utf-8"))["documents"]
LINES = (HERE / "oracles" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
STOP = 318  # <|eot_id|>


def expected(folder, document):
    """The last answer of a document of the oracle, and what the model in `folder` says in its place."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids, trained = document["ids"], document["trained"]
    start = max(i for i in range(len(ids)) if trained[i] and not trained[i - 1])
    model, text = from_pretrained(folder), ids[:start]
    for _ in range(128):
        token = int(model.logits(torch.tensor(text))[-1].argmax())
        if token == STOP or token == 310:
            break
        text = [*text, token]
    reference = [token for token in ids[start:] if token != STOP]
    return [tokenizer.decode(part, skip_special_tokens=False) for part in (ids[:start], text[start:], reference)]


@pytest.fixture
def heldout(tmp_path):
    file = tmp_path / "heldout.jsonl"
    file.write_text("\n".join(LINES[:4]), encoding="utf-8")
    return file


def test_answers_at_each_evaluation(base, tmp_path, heldout):
    train(base, tmp_path, data__eval=heldout, eval__samples=2, eval__every=2, checkpoint__export_every=2,
          train__max_steps=3)
    run = tmp_path / "run"
    records = log(tmp_path, "sample")
    assert [(record["step"], record["name"]) for record in records] == [
        (step, "heldout") for step in (0, 0, 2, 2, 3, 3)]
    folders = [folder for folder in (base, run / "exports/step-000002", run / "final") for _ in range(2)]
    for record, folder, document in zip(records, folders, DOCUMENTS[:2] * 3, strict=True):
        assert [record["prompt"], record["answer"], record["reference"]] == expected(folder, document)
    assert all(record["seconds"] > 0 for record in log(tmp_path, "eval"))

    found = json.loads((run / "environment.json").read_text())
    assert (found["ranks"], found["python"]) == (1, platform.python_version())
    assert found["packages"]["torch"] == torch.__version__
    assert command(["prepare", str(run / "config.toml"), "--json", str(tmp_path / "data.json")]) == 0
    assert json.loads((run / "data.json").read_text()) == json.loads((tmp_path / "data.json").read_text())


@pytest.mark.slow
def test_sharded_models_answer_too(base, tmp_path, heldout):
    settings = {"data__eval": heldout, "eval__samples": 3, "train__max_steps": 1}
    train(base, tmp_path / "1", **settings)
    train(base, tmp_path / "2", ranks=2, **settings)
    assert len(log(tmp_path / "2", "sample")) == 6
    assert log(tmp_path / "2", "sample")[:3] == log(tmp_path / "1", "sample")[:3]
    assert json.loads((tmp_path / "2/run/environment.json").read_text())["ranks"] == 2


def test_text_has_no_answers(base, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text('{"text": "It was a dark night."}\n')
    assert main(options(base, tmp_path, data__eval=tmp_path / "text.jsonl", eval__samples=1)) == 2
    assert "eval.samples = 1: data.eval has no question that an answer follows" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"eval\.samples: 2 questions of each file to answer, but data\.eval"):
        config_io.load(options(base, tmp_path, eval__samples=2))


@pytest.mark.parametrize("name", ["data.json", "environment.json"])
def test_another_programs_files_are_not_written_over(base, tmp_path, capsys, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    assert main(options(base, tmp_path)) == 2
    assert f"holds {name}, but no run" in capsys.readouterr().err
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_packs_by_fill():
    """Against a loop; a pack of exactly 5% belongs to the first twentieth, one token more to the second."""
    rng = np.random.default_rng(0)
    packs = [[5], [6], [100], [50, 50], [95], [96], *([int(n) for n in rng.integers(1, 20, 4)] for _ in range(50))]
    counts = [0] * 20
    for pack in packs:
        counts[next(i for i in range(20) if sum(pack) <= 5 * (i + 1))] += 1
    lengths, offsets = np.concatenate(packs), np.cumsum([0, *map(len, packs)])
    assert pack_fill(lengths, offsets, 100) == counts


def test_the_environment_without_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(on, "SOURCE", tmp_path)
    found = on.environment()
    assert found["commit"] == ""
    assert found["packages"].get("minisft", __version__) == __version__
    assert json.loads(json.dumps(found)) == found
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert on.commit(tmp_path) == ""
