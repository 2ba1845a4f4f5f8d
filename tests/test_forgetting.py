"""Forgetting is the general text's loss minus the base model's, and it is the same figure after any crash."""

import io
import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from small_runs import HERE, log, options, train, wait_for_savers
from test_resume import Death

from minisft import config_io
from minisft.__main__ import main as command
from minisft.config import DataConfig
from minisft.errors import UserError
from minisft.evals import heldout
from minisft.evals.heldout import file_losses, loss_figures, measure_forgetting
from minisft.generate.assistant import Assistant
from minisft.prepare import prepare
from minisft.pretrained import from_pretrained
from minisft.reports.data_report import describe, figures
from minisft.runs import metrics
from minisft.runs.after import AfterStep
from minisft.runs.lifecycle import main

TEXTS = ["In spring the river rises and the mill turns.", "The clock on the tower is late, as it always was.",
         "He wrote the letter twice, and sent neither of the two."]


@pytest.fixture
def general(tmp_path):
    file = tmp_path / "general.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def naive(folder, argv):
    """The mean loss over all tokens of the texts except each one's first, document by document."""
    model, dataset = from_pretrained(folder), prepare(config_io.load(argv), quiet=True).evals["general"]
    losses = []
    for i in range(len(dataset)):
        ids = torch.tensor(dataset.document(i)[0].astype("int64"))
        losses.append(-model.logits(ids)[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0])
    return float(torch.cat(losses).mean())


def test_forgetting_is_the_rise_over_the_base_model(base, tmp_path, general):
    """On two ranks, which have different texts to themselves."""
    train(base, tmp_path, ranks=2, batch__packs=2, data__general=general, train__max_steps=3, eval__every=2)
    records = log(tmp_path, "eval")
    assert [(r["step"], r["name"]) for r in records] == [(0, "general"), (2, "general"), (3, "general")]
    argv = options(base, tmp_path, data__general=general)
    before, after = naive(base, argv), naive(tmp_path / "run" / "final", argv)
    assert records[0]["forgetting"] == 0
    assert records[-1]["forgetting"] == pytest.approx(after - before, abs=2e-5)
    for record, loss in ((records[0], before), (records[-1], after)):
        assert record["loss"] == pytest.approx(loss, abs=1e-5)
        assert record["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_only_general_text_is_forgotten(base, tmp_path, general):
    train(base, tmp_path, data__general=general, data__eval=HERE / "oracles/conversations.jsonl", train__max_steps=1,
          batch__packs=1)
    assert {r["name"]: "forgetting" in r for r in log(tmp_path, "eval")} == {"conversations": False, "general": True}
    assert all(r["perplexity"] == pytest.approx(math.exp(r["loss"])) for r in log(tmp_path, "eval"))


@pytest.mark.parametrize("die_at", [1, 4])  # before the first checkpoint; after it
def test_a_resumed_run_measures_against_the_same_base(base, tmp_path, general, monkeypatch, die_at):
    settings = {"data__general": general, "train__max_steps": 5, "eval__every": 1, "checkpoint__every": 2,
                "batch__packs": 1}
    train(base, tmp_path / "whole", **settings)
    step = AfterStep.step

    def dying(after, number, **kwargs):
        if number == die_at:
            raise Death
        return step(after, number, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AfterStep, "step", dying)
        with pytest.raises(Death):
            main(options(base, tmp_path / "died", **settings))
        wait_for_savers()
    train(base, tmp_path / "died", **settings)
    died, whole = ([{name: value for name, value in record.items() if name != "seconds"}
                    for record in log(tmp_path / run, "eval")] for run in ("died", "whole"))
    assert died == whole


@pytest.mark.parametrize(("change", "refused"), [("other text", True), ("another set", False), ("no set", False)])
def test_a_resumed_run_compares_losses_of_the_same_text_only(base, tmp_path, general, capsys, change, refused):
    settings = {"data__general": general, "checkpoint__every": 1, "batch__packs": 1}
    train(base, tmp_path, train__max_steps=1, **settings)
    if change == "other text":
        general.write_text(general.read_text().replace("spring", "autumn"))
    elif change == "another set":
        (other := tmp_path / "other.jsonl").write_text(general.read_text())
        settings["data__general"] = f"{general},{other}"
    else:
        settings["data__general"] = ""
    assert main(options(base, tmp_path, train__max_steps=2, **settings)) == (2 if refused else 0)
    assert ("held-out general: was ['" in capsys.readouterr().err) is refused


def test_a_long_evaluation_and_export_are_progress(base, tmp_path, general, monkeypatch):
    """Each batch and each tensor starts the clock of parallel.timeout anew."""
    started = []
    monkeypatch.setattr(metrics, "watch", started.append)
    train(base, tmp_path, data__general=general, train__max_steps=1, batch__packs=1, data__seq_len=64)
    with safe_open(tmp_path / "run/final/model.safetensors", framework="pt") as saved:
        tensors = len(saved.keys())
    assert len(started) >= 2 * len(TEXTS) + tensors


def test_the_warning_comes_once_a_crossing_and_names_remedies(base, tmp_path, general, capsys):
    train(base, tmp_path, data__general=general, train__max_steps=3, eval__every=1, optim__lr=0.1,
          batch__packs=1, eval__forgetting_bound=0.01)
    forgotten = [r["forgetting"] for r in log(tmp_path, "eval")]
    first = next(step for step, value in enumerate(forgotten) if value > 0.01)
    assert 0 < first < len(forgotten) - 1  # or this test says nothing
    assert all(value > 0.01 for value in forgotten[first:])
    printed = capsys.readouterr()
    said = [line for line in (printed.out + printed.err).splitlines() if "the model forgets" in line]
    assert len(said) == 1
    assert f"step {first}: the model forgets: general costs it {forgotten[first]:.3f} nats a token more" in said[0]
    assert "(eval.forgetting_bound = 0.01)" in said[0]
    for remedy in ("data.replay", "optim.lr", "train.max_steps", "LoRA"):
        assert remedy in said[0]


def eval_record(step, loss, name="g"):
    return {"kind": "eval", "step": step, "name": name, "loss": loss}


def warnings(losses, *, bound=0.1, first=0, before=()):
    """What is said about one text after another evaluation, and the records. Those `before` are of other texts too."""
    records, said = list(before), []
    for step, loss in enumerate(losses, first):
        record = eval_record(step, loss)
        said.append(measure_forgetting(record, records, bound=bound))
        records += [record, eval_record(step, 9.0, name="other")]
    return said, records


def test_a_bound_is_crossed_upwards_and_a_resumed_run_knows_it():
    losses = [2.0, 2.05, 2.2, 2.3, 2.05, 2.11, None, 2.11]
    said, records = warnings(losses)
    assert list(map(bool, said)) == [False, False, True, False, False, True, False, False]
    for resumed_at in range(1, len(losses)):
        log = json.loads(json.dumps(records[: 2 * resumed_at]))
        assert warnings(losses[resumed_at:], first=resumed_at, before=log) == (said[resumed_at:], records)
    assert warnings([1.0, 9.0], bound=0)[0] == ["", ""]
    assert warnings([1.0, None, 9.0])[0][:2] == ["", ""]
    assert warnings([1.0, 9.0, None, 9.0])[0][2:] == ["", ""], "nothing known in between is no crossing"


@given(st.lists(st.sampled_from([None, 1.0, 1.0, 1.05, 1.2, 1.3]), max_size=9), st.sampled_from([0.0, 0.1, 0.25]),
       st.booleans())
def test_warnings_follow_the_state_of_each_text(losses, bound, has_base):
    """Against a machine with a state: it speaks when the state becomes another one that is bad."""
    said, records = warnings(losses, bound=bound, first=0 if has_base else 1)
    base, state = None, "good"
    for warning, record in zip(said, records[::2], strict=True):
        became = state
        if record["loss"] is not None:
            base = record["loss"] if record["step"] == 0 else base
            became = ("missing" if base is None else
                      "forgets" if bound and record["loss"] - base > bound else "good")
            assert record.get("forgetting") == (None if base is None else record["loss"] - base)
        expected = {"missing": "cannot measure forgetting", "forgets": "the model forgets"}
        assert (expected[became] in warning) if became != state and became != "good" else warning == ""
        state = became


def test_without_the_base_model_s_loss_nothing_is_made_up():
    [first, second], records = warnings([2.0, 3.0], first=5)
    assert first == "step 5: cannot measure forgetting on g: its loss at step 0 is missing"
    assert second == ""
    assert not any("forgetting" in record for record in records)


def test_general_text_that_is_also_trained_is_counted(base, tmp_path, general):
    replay = tmp_path / "replay.jsonl"
    replay.write_text(json.dumps({"text": TEXTS[1]}) + "\n" + json.dumps({"text": "Something else altogether."}) + "\n")
    prepared = prepare(config_io.load(options(base, tmp_path, data__general=general, data__replay=replay)),
                       quiet=True)
    found = figures(prepared)
    assert [(source["name"], source["also_trained"]) for source in found["general"]] == [("general", 1)]
    assert found["eval"] == []
    printed = describe(found)
    assert "\ngeneral text:\ngeneral " in printed
    assert "also in the training data, exactly or nearly: 1" in printed


@pytest.mark.parametrize(("loss", "figures"), [
    (0.0, {"loss": 0.0, "perplexity": 1.0}), (math.log(2), {"loss": math.log(2), "perplexity": pytest.approx(2.0)}),
    (math.nan, {"loss": None, "perplexity": None}), (math.inf, {"loss": None, "perplexity": None}),
    (5000.0, {"loss": 5000.0, "perplexity": None})])
def test_figures_are_json(loss, figures):
    assert loss_figures(loss) == figures
    json.dumps(loss_figures(loss), allow_nan=False)


def test_losses_of_files_are_those_of_their_documents(base, tmp_path, general):
    """Answers count in conversations, every token in text: against a plain loop over the documents."""
    conversations, assistant = HERE / "oracles" / "conversations.jsonl", Assistant.load(base, template="llama3")
    oracle = json.loads((HERE / "oracles" / "trl_curve.json").read_text(encoding="utf-8"))
    data = DataConfig(cache=tmp_path / "cache")
    found = file_losses(assistant, [str(conversations), str(general)], data, quiet=True)
    total = count = 0
    for document in oracle["documents"]:
        ids, trained = torch.tensor(document["ids"]), torch.tensor(document["trained"])[1:] > 0
        losses = -assistant.model.logits(ids)[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        total, count = total + float(losses[trained].sum()), count + int(trained.sum())
    assert (found[0]["name"], found[0]["target_tokens"]) == (str(conversations), count)
    assert found[0]["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found[0]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found[1]["loss"] == pytest.approx(naive(base, options(base, tmp_path, data__general=general)), abs=1e-5)
    short, = file_losses(assistant, [str(conversations)], replace(data, seq_len=128), quiet=True)
    assert short["left_out"] == sum(len(document["ids"]) > 128 for document in oracle["documents"])
    assistant.model.config = replace(assistant.model.config, max_position_embeddings=128)
    assert file_losses(assistant, [str(conversations)], data, quiet=True) == [short], (
        "a model says nothing past its context")


def test_the_model_reads_the_documents_of_a_file_and_no_padding(base, tmp_path, general, monkeypatch):
    read, whole = [], heldout.batch_loss
    monkeypatch.setattr(heldout, "batch_loss", lambda model, batch, *args, **options: read.append(
        len(batch.tokens)) or whole(model, batch, *args, **options))
    assistant = Assistant.load(base, template="llama3")
    file_losses(assistant, [str(general)], DataConfig(cache=tmp_path / "cache"), quiet=True)
    assert sum(read) == sum(1 + len(assistant.renderer.tokenizer.encode(text)) + 1 for text in TEXTS)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_on_a_terminal_unless_it_is_to_be_quiet(base, tmp_path, general, monkeypatch):
    assistant = Assistant.load(base, template="llama3")
    for quiet in ({}, {"quiet": True}):
        monkeypatch.setattr(sys, "stderr", Terminal())
        file_losses(assistant, [str(general)], DataConfig(cache=tmp_path / f"cache{quiet}"), **quiet)
        assert (f"tokenise {general}: " in sys.stderr.getvalue()) == (not quiet)


def test_a_file_of_another_tokenizer_is_refused(base, tmp_path, general):
    assistant = Assistant.load(base, template="llama3")
    assistant.model.config = replace(assistant.model.config, vocab_size=300)
    with pytest.raises(UserError, match="is past the model's vocabulary of 300"):
        file_losses(assistant, [str(general)], DataConfig(cache=tmp_path / "cache"), quiet=True)


def test_minisft_eval_prints_and_writes_them(base, tmp_path, general, capsys):
    arguments = ["eval", str(base), "--template", "llama3", "--data", str(general), "--json", str(tmp_path / "o.json")]
    assert command(arguments) == 0
    found, = json.loads((tmp_path / "o.json").read_text())["losses"]
    loss = naive(base, options(base, tmp_path, data__general=general))
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    assert re.search(rf"^ +{loss:.4f} +[\d.]+ +102 +3 +0  {general}$", capsys.readouterr().out, re.MULTILINE)
    assert command(["eval", str(base), "--data", str(general)]) == 2
    assert "choose with --template" in capsys.readouterr().err
    assert command(["eval", str(base), "--template", "llama3", "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "advice", "keys"), [
    ('{"soru": "hi", "cevap": "yo"}', "--data.fields '{",
     ["--data.fields", '{instruction = "soru", output = "cevap"}']),
    ('{"instruction": "a", "output": "b"}\nnone', "pass --data.skip_bad true", ["--data.skip_bad", "true"]),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "images": ["x"]}',
     "(--data.ignore images takes", ["--data.ignore", "images"]),
    (json.dumps({"instruction": "a", "output": "b" * 9000}), "pass --data.overlong truncate",
     ["--data.overlong", "truncate"]),
])
def test_minisft_eval_takes_the_keys_that_it_advises(base, tmp_path, capsys, content, advice, keys):
    (tmp_path / "c.jsonl").write_text(content + "\n")
    arguments = ["eval", str(base), "--template", "llama3", "--data", str(tmp_path / "c.jsonl")]
    assert command(arguments) == 2
    assert advice in capsys.readouterr().err
    assert command([*arguments, *keys]) == 0
    assert re.search(rf" 1 +[01]  {tmp_path}/c.jsonl$", capsys.readouterr().out, re.MULTILINE)
    assert command([*arguments, *keys, "--data.max_bad", "many"]) == 2
    assert capsys.readouterr().err == ("error: the configuration has 1 problem:\n  command line: --data.max_bad: "
                                       "expected int >= 0, got 'many'\n")


@pytest.mark.slow
def test_only_so_many_tokens_are_evaluated_and_always_the_same(base, tmp_path, general):
    """On one rank and on two; the oracle reads the chosen documents one by one."""
    general.write_text("".join(json.dumps({"text": f"{text} {'Then again. ' * (i % 5)}"}) + "\n"
                               for i in range(12) for text in TEXTS))
    settings = {"data__general": general, "train__max_steps": 3, "eval__every": 1, "eval__max_tokens": 150}
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        train(base, folder, ranks=ranks, batch__packs=2, **settings)
        found[ranks] = [(r["step"], r["target_tokens"]) for r in log(folder, "eval")]
        for record, model in ((log(folder, "eval")[0], base), (log(folder, "eval")[-1], folder / "run" / "final")):
            assert record["loss"] == pytest.approx(naive(model, options(base, folder, **settings)), abs=1e-5)
    assert found[1] == found[2]
    assert [step for step, _ in found[1]] == [0, 1, 2, 3]
    chosen = {seed: prepare(config_io.load(options(base, tmp_path, train__seed=seed, **settings)), quiet=True)
              .evals["general"] for seed in range(8)}
    whole = prepare(config_io.load(options(base, tmp_path, **settings | {"eval__max_tokens": 0})), quiet=True)
    lengths = whole.evals["general"].lengths
    for dataset in chosen.values():
        assert 150 - lengths.max() < dataset.lengths.sum() <= 150
        lines = [dataset.origin(i)[1] for i in range(len(dataset))]
        assert lines == sorted(set(lines))
        assert [int(lengths[line - 1]) for line in lines] == dataset.lengths.tolist()
    assert len({tuple(dataset.index_in_store.tolist()) for dataset in chosen.values()}) > 4
    assert found[1][0][1] == int(chosen[0].num_loss_tokens.sum())


def test_a_run_does_not_resume_on_other_held_out_documents(base, tmp_path, general, capsys):
    train(base, tmp_path, data__general=general, train__max_steps=2, eval__max_tokens=20)
    assert main(options(base, tmp_path, data__general=general, train__max_steps=3, eval__max_tokens=30)) == 2
    assert "eval.max_tokens: was 20, is 30" in capsys.readouterr().err
