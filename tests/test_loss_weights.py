"""Weights in the loss, from the file to the gradient: a step's loss is the sum over its trained tokens of weight times
loss, divided by the sum of those weights.

The oracle is a loop over single documents in plain torch. Its ids and weights come from docs/one_file.py, which encodes
by itself.
"""

import importlib.util
import json
import math
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_runs import HERE, assert_same, final_weights, log, options, train
from test_lora import adapted
from torch.testing import assert_close

from minisft import config_io
from minisft.__main__ import main
from minisft.config import LoraConfig, OptimConfig
from minisft.data.batches import steps
from minisft.model.llama import Documents
from minisft.prepare import prepare
from minisft.pretrained import from_pretrained
from minisft.training.loss import batch_loss

# The weight of the record (None: it has none), then those of its answers.
WEIGHTS = [(None, [0.3]), (None, [1, 2.5]), (None, [None]), (0.7, [0.3, 0, 2.5]), (2, [None, None]), (None, [0, 1]),
           (1, [1]), (0.1, [3, 0.2]), (None, [2.5, 2.5, 0.3]), (0, [1]), (None, [0.01])]
WORDS = ("sea", "ice", "sun", "oak", "red", "elm", "sky", "fog", "hut", "yes")


def talk(number, weights):
    messages = []
    for i, weight in enumerate(weights):
        question, answer = (" ".join(WORDS[(number * step + i + k) % 10] for k in range(1 + number % 3))
                            for step in (3, 7))
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages[-1] |= {} if weight is None else {"weight": weight}
    return messages


TALKS = [talk(number, weights) for number, (_, weights) in enumerate(WEIGHTS)]
ALL = {"batch__packs": 1000, "data__seq_len": 128, "train__max_steps": 1}  # one step of several packs
LINEAR = {"optim__eps": 1000.0, "optim__lr": 1000.0, "optim__clip_norm": 0}  # the first update is all but the gradient


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "weighted.jsonl"
    file.write_text("".join(json.dumps({"messages": messages} | ({} if weight is None else {"weight": weight})) + "\n"
                            for messages, (weight, _) in zip(TALKS, WEIGHTS, strict=True)))
    return file


@pytest.fixture(scope="module")
def documents(base):
    """(ids, weights) of each document that trains something, as one_file.py encodes it."""
    spec = importlib.util.spec_from_file_location("one_file", HERE.parent / "docs" / "one_file.py")
    one_file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(one_file)
    template = one_file.TEMPLATES["llama3"]
    tokenizer, found = one_file.load_tokenizer(base, template), []
    for messages, (of_record, weights) in zip(TALKS, WEIGHTS, strict=True):
        of_answers = iter([(1 if of_record is None else of_record) * (1 if w is None else w) for w in weights])
        turns = [(m["role"], m["content"], next(of_answers) if m["role"] == "assistant" else 0) for m in messages]
        ids, weights = one_file.encode(turns, template, tokenizer)
        found += [(ids, weights)] if any(weights) else []
    return found


def plain_loss(model, documents):
    """The definition, one document after another."""
    total = sum(weight for _, weights in documents for weight in weights)
    loss = torch.zeros(())
    for ids, weights in documents:
        hidden = model(torch.tensor(ids), Documents.of_lengths((len(ids),)), lambda hidden, head: hidden @ head.T)
        losses = F.cross_entropy(hidden[:-1], torch.tensor(ids[1:]), reduction="none")
        loss = loss + (losses * torch.tensor(weights[1:], dtype=torch.float32)).sum()
    return loss / total


def exact_sum(documents):
    return float(sum(Fraction(weight) for _, weights in documents for weight in weights))


@pytest.fixture(scope="module")
def expected(base, documents):
    """Loss and gradients of one step of all documents."""
    model = from_pretrained(base).float()
    loss = plain_loss(model, documents)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def test_the_dump_shows_the_weights(base, data, documents, tmp_path):
    """`weights` beside `trained`, which stays 0 and 1; only for documents that have any."""
    dump, report = tmp_path / "dump.jsonl", tmp_path / "report.json"
    settings = options(base, tmp_path, data__train=data)
    assert main(["prepare", *settings, "--dump", str(dump), "--json", str(report)]) == 0
    dumped = [json.loads(line) for line in dump.read_text().splitlines()]
    assert [record["ids"] for record in dumped] == [ids for ids, _ in documents]
    assert [record["trained"] for record in dumped] == [[int(w > 0) for w in weights] for _, weights in documents]
    for record, (_, weights) in zip(dumped, documents, strict=True):
        assert record.get("weights") == (weights if set(weights) - {0, 1} else None)
    [source] = json.loads(report.read_text())["train"]
    assert source["weighted_tokens"] == sum(weight not in (0, 1) for _, weights in documents for weight in weights)
    assert source["target_tokens"] == sum(weight > 0 for _, weights in documents for weight in weights)
    assert source["skipped"] == {"marked as not trained": 1}


@pytest.mark.parametrize("change", [{}, pytest.param({"ranks": 2}, marks=pytest.mark.slow),
                                    {"batch__micro_packs": 3}, {"data__seq_len": 512}])
def test_loss_and_gradients_are_those_of_single_documents(base, data, documents, expected, tmp_path, change):
    """On any split over ranks, micro-batches and packs. The step's update is its gradient, by a huge optim.eps."""
    loss, gradients = expected
    [record] = train(base, tmp_path, data__train=data, data__eval=data, **{**ALL, **LINEAR, **change})
    for found in (record, log(tmp_path, "eval")[0]):  # the held-out loss, too
        assert found["loss"] == pytest.approx(loss, rel=1e-6)
        assert found["target_weight"] == pytest.approx(exact_sum(documents), rel=1e-15)
        assert found["target_tokens"] == sum(weight > 0 for _, weights in documents for weight in weights)
    before, after = load_file(base / "model.safetensors"), final_weights(tmp_path)
    for name, gradient in gradients.items():
        assert_close(before[name] - after[name], gradient / (1 + gradient.abs() / 1000), rtol=1e-4, atol=5e-7)


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(label_smoothing=0.1, z_loss=1e-2)])
def test_gradients_of_adapters_are_those_of_single_documents(base, data, documents, tmp_path, optim):
    model = adapted(base, LoraConfig(rank=4, base="fp32"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    prepared = prepare(config_io.load(options(base, tmp_path, data__train=data, **ALL)), quiet=True)
    [step] = steps(prepared.train, prepared.plan)
    assert len(step.micro_batches) > 2
    loss = sum(batch_loss(model, batch, torch.device("cpu"), step.target_weight, optim) for batch in step.micro_batches)
    ours = torch.autograd.grad(loss, list(trained.values()))
    plain = torch.zeros(())
    for ids, weights in documents:
        logits = model(torch.tensor(ids), Documents.of_lengths((len(ids),)), lambda hidden, head: hidden @ head.T)[:-1]
        losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none", label_smoothing=optim.label_smoothing)
        losses = losses + optim.z_loss * logits.logsumexp(-1) ** 2
        plain = plain + (losses * torch.tensor(weights[1:], dtype=torch.float32)).sum() / exact_sum(documents)
    assert_close(loss, plain, rtol=1e-6, atol=0)
    for found, theirs in zip(ours, torch.autograd.grad(plain, list(trained.values())), strict=True):
        assert_close(found, theirs, rtol=1e-4, atol=1e-7)
    assert len(trained) > 4


def test_the_sum_of_weights_is_exact_and_the_same_however_a_step_is_split(base, data, tmp_path):
    """On any number of ranks, and resumed in the middle; it is the sum of the step's own tokens."""
    settings = options(base, tmp_path, data__train=data, data__seq_len=64, batch__packs=3)
    prepared = prepare(config_io.load(settings), quiet=True)
    whole = [step.target_weight for step in steps(prepared.train, prepared.plan)]
    assert len(whole) > 3
    for ranks in (2, 3):
        found = [list(steps(prepared.train, prepared.plan, rank=rank, ranks=ranks, micro_packs=2))
                 for rank in range(ranks)]
        for index, of_ranks in enumerate(zip(*found, strict=True)):
            assert {step.target_weight for step in of_ranks} == {whole[index]}
            weights = [np.ones(len(batch.targets)) if batch.target_weights is None else batch.target_weights.numpy()
                       for step in of_ranks for batch in step.micro_batches]
            assert whole[index] == pytest.approx(math.fsum(np.concatenate(weights)), rel=1e-15)
    assert [step.target_weight for step in steps(prepared.train, prepared.plan, start=2)] == whole[2:]


def test_a_run_resumes_bit_for_bit(base, data, tmp_path):
    settings = {"data__train": data, "data__seq_len": 64, "batch__packs": 3, "train__max_steps": 6,
                "checkpoint__every": 3}
    train(base, tmp_path / "whole", **settings)
    uninterrupted = log(tmp_path / "whole"), final_weights(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "run", tmp_path / "again" / "run")
    shutil.rmtree(tmp_path / "again" / "run" / "final")
    shutil.rmtree(tmp_path / "again" / "run" / "checkpoints" / "step-000006")
    train(base, tmp_path / "again", **settings)
    assert_same(tmp_path / "again", uninterrupted)
    assert [r["target_weight"] for r in log(tmp_path / "again")] == [r["target_weight"] for r in uninterrupted[0]]


def test_only_the_ratio_of_weights_counts_and_a_source_without_any_has_ones(base, tmp_path):
    """A file whose weights are all 2, beside one without weights whose documents count half as much each."""
    def written(name, talks, **weight):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"messages": talk(i, [None]), **weight}) + "\n" for i in talks))
        return str(file)

    one, two, ones = written("one", range(5)), written("two", range(5, 9), weight=2), written("ones", range(5, 9))
    half = written("half", range(5), weight=0.5)
    mixed, alike = (train(base, tmp_path / name, data__train=f"{first},{second}", **ALL)
                    for name, first, second in (("mixed", one, two), ("alike", half, ones)))
    assert mixed[0]["loss"] == pytest.approx(alike[0]["loss"], rel=1e-6)
    assert mixed[0]["target_weight"] == 2 * alike[0]["target_weight"]
    weights = final_weights(tmp_path / "alike")
    for name, weight in final_weights(tmp_path / "mixed").items():
        assert_close(weight, weights[name], rtol=0, atol=1e-5)


def test_data_without_weights_has_no_sum_of_weights(base, tmp_path):
    file = tmp_path / "plain.jsonl"
    file.write_text("".join(json.dumps({"messages": talk(i, [1, 0, 1.0]), "weight": True}) + "\n" for i in range(5)))
    [record] = train(base, tmp_path, data__train=file, data__eval=file, **ALL)
    assert not {"target_weight", "weights"} & {key for each in (record, *log(tmp_path, "eval")) for key in each}
    [store] = [folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]
    assert not (store / "weights.npy").exists()


@pytest.mark.parametrize("weight", ["-1", "1e999", '"x"', "[1]"])
def test_a_malformed_weight_is_named_with_its_place_and_a_remedy_that_works(base, tmp_path, capsys, weight):
    file = tmp_path / "bad.jsonl"
    good = json.dumps({"messages": talk(1, [None])})
    file.write_text(f'{good}\n{good[:-1]}, "weight": {weight}}}\n')
    assert main(["prepare", *options(base, tmp_path, data__train=file)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    value = {"weight": float("inf") if "999" in weight else json.loads(weight)}
    assert ("left out, weight is not 0 or a number from 1e-12 to 1e+12 (--data.ignore weight takes the record "
            f"without it): 1 (first: {file}:2: {value})") in printed
    assert main(["prepare", *options(base, tmp_path, data__train=file, data__ignore="weight")]) == 0
    assert "left out" not in capsys.readouterr().out


def test_show_names_the_range_of_weights(base, data, tmp_path, capsys):
    settings = options(base, tmp_path, data__train=data)
    assert main(["show", *settings, "--index", "3"]) == 0
    assert f"{data}:4 · loss weights 0.21 to 1.75 · " in capsys.readouterr().out
    assert main(["show", *settings, "--index", "5"]) == 0
    assert f"{data}:6 · " in (printed := capsys.readouterr().out)
    assert "weights" not in printed
