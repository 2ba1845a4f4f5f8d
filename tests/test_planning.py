"""`minisft plan` prints what follows from its assumptions; the oracle is arithmetic by hand, or by NumPy."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from minisft.__main__ import main
from minisft.model.llama_config import PRESETS
from minisft.planning.estimate import Traffic, find_gpu

HERE = Path(__file__).parent
GIB = 2**30
N, BLOCK, VOCABULARY = 8_030_261_248, 218_112_000, 128_256 * 4096  # of Llama-3-8B


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Llama-3-8B by its preset, without weights or data."""
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text("""
        model = {init = "random", config = "llama-3-8b"}
        data = {train = ["nowhere.jsonl"], seq_len = 8192}
        train = {epochs = 3}
    """)


def planned(*options):
    assert main(["plan", "r.toml", "--json", "plan.json", *options]) == 0
    return json.loads(Path("plan.json").read_text())


def refused(capsys, *options):
    assert main(["plan", "r.toml", *options]) == 2
    return capsys.readouterr().err


def test_the_figures_of_8b_on_eight_h100_by_hand(recipe):
    found = planned("--tokens", "50M", "--document-length", "500", "--hours-price", "3", "--utilisation", "0.4")
    parts = found["memory"]["selective"]["parts_gib"]
    state = parts["parameters"] + parts["gradients"] + parts["moments"]  # 4 + 4 + 8 bytes, gradients accumulate
    assert found["parameters"] == N
    assert state == pytest.approx(14.96, abs=0.005)
    # 2 (q, o) + 2 (k, v) + 3 matrices; a token of a document of 500 attends to 250.5 on average
    block = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    flops = 6 * (32 * block + VOCABULARY) + 3 * 32 * 4 * 4096 * 250.5
    assert found["flops_per_token"]["none"] == pytest.approx(flops)
    assert found["flops_per_token"]["selective"] - flops == pytest.approx(32 * 2 * 4096 * 14_336)
    best = found["recommended"]
    assert sum(best["compute_seconds"]) == pytest.approx(
        found["flops_per_token"][best["activation_checkpointing"]] * 8192 * best["micro_packs"] / (0.4 * 989e12))
    assert found["steps"] == 3 * math.ceil(50e6 / (32 * 8192))
    assert found["tokens"] == 150_000_000
    assert found["hours"] == pytest.approx(found["steps"] * best["step_seconds"] / 3600)
    assert found["dollars"] == pytest.approx(found["hours"] * 8 * 3)
    assert found["assumed"] == "packs full of 500-token documents, all tokens trained"


def test_the_published_activations_of_8b(recipe):
    """32 layers, bf16: x, norm, q, k, v, attention, x, norm, gate, up, product (the compiler makes silu again); and the
    selected."""
    found = planned("--batch.packs", "8")["memory"]
    per_layer = {"none": 2 * (6 * 4096 + 2 * 1024 + 3 * 14_336) + 4 * 32 + 8,
                 "selective": 2 * (4 * 4096 + 2 * 1024 + 14_336) + 4 * 32}
    assert 32 * per_layer["selective"] / 2**20 == pytest.approx(2.0, rel=0.01)  # MiB a token
    for policy, one in per_layer.items():
        kept = 32 * one + 2 * 4096 + 3 * 2 * 4096  # the last block's output, its norm, the trained and their gradient
        assert found[policy]["instant"] == "head"
        assert found[policy]["parts_gib"]["activations"] == pytest.approx(8192 * kept / GIB)


def test_largest_micro_batch_is_the_last_that_fits(recipe):
    found = planned("--batch.packs", "64")
    assert found["packs_per_gpu"] == 8
    for policy, largest in found["largest_micro_packs"].items():
        for micro_packs, fits in ((largest, True), (largest + 1, False)):
            if 0 < micro_packs <= 8:
                memory = planned("--batch.packs", "64", "--batch.micro_packs", str(micro_packs))["memory"][policy]
                assert memory["fits"] is fits
                assert fits is (memory["allocated_gib"] * 1.2 <= 79.65 - 1.5)
    assert found["recommended"]["fits"]


def test_bytes_sent_by_hand():
    """8 ranks, NVLink: each sends 7/8 of what is gathered (bf16, the blocks twice) and of what is reduced (fp32)."""
    traffic = Traffic.of(PRESETS["llama-3-8b"], find_gpu("h100"), shards=8, copies=1)
    assert traffic.gathered_forward == pytest.approx(7 / 8 * 2 * N)
    assert traffic.gathered_backward == pytest.approx(7 / 8 * 2 * 32 * BLOCK)
    assert traffic.reduced == pytest.approx(7 / 8 * 4 * N)
    assert traffic.copied == 0
    assert traffic.forward_seconds == pytest.approx(7 / 8 * 2 * N / (0.75 * 450e9))
    hosts = Traffic.of(PRESETS["llama-3-8b"], find_gpu("h100"), shards=8, copies=2)
    assert hosts.copied == pytest.approx(2 * 1 / 2 * 4 * N / 8)
    assert hosts.backward_seconds - traffic.backward_seconds == pytest.approx(hosts.copied / (0.75 * 50e9))
    alone = Traffic.of(PRESETS["llama-3-8b"], find_gpu("h100"), shards=1, copies=1)
    assert alone.forward_seconds == alone.backward_seconds == 0


def test_existing_data_are_counted(base, recipe, capsys):
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "llama"}
    Path("shape.json").write_text(json.dumps(shape))
    options = ["--model.config", "shape.json", "--model.tokenizer", str(base), "--data.train",
               str(HERE / "oracles" / "conversations.jsonl"), "--data.template", "llama3", "--data.seq_len", "512",
               "--data.cache", "cache", "--batch.packs", "2"]
    found = planned(*options, "--gpus", "2")
    capsys.readouterr()
    assert main(["prepare", "r.toml", "--dump", "dump.jsonl", *options]) == 0
    documents = [json.loads(line) for line in Path("dump.jsonl").read_text().splitlines()]
    lengths = np.array([len(document["ids"]) for document in documents])
    trained = sum(map(sum, (document["trained"] for document in documents)))
    assert found["assumed"] == ""
    assert found["tokens"] == 3 * lengths.sum()
    assert found["trained_share"] == pytest.approx(trained / lengths.sum())
    block = 64 * (2 * 64 + 2 * 32) + 3 * 64 * 96
    pairs = (lengths * (lengths + 1) / 2).sum()
    flops = 3 * 2 * (2 * block * lengths.sum() + 4 * 64 * pairs) + 6 * 64 * 512 * trained
    assert found["flops_per_token"]["none"] == pytest.approx(flops / lengths.sum())


def test_without_data_or_tokens_the_assumption_is_printed(recipe, capsys):
    found = planned()
    assert found["hours"] is None
    assert found["dollars"] is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "packs full of 8,192-token documents, all tokens trained; nowhere.jsonl is missing" in printed
    assert "minutes a million tokens" in printed
    assert "computed, not measured" in printed


def test_what_does_not_fit_comes_with_a_remedy(recipe, capsys):
    error = refused(capsys, "--gpu", "rtx4090")
    assert "nothing fits: one pack of 8,192 tokens with parallel.activation_checkpointing = full takes" in error
    assert "8 x GeForce RTX 4090 24 GB, which has 22.1 GiB usable. To make it fit, shard over 16 GPUs" in error
    assert planned("--gpu", "rtx4090", "--gpus", "16")["recommended"]["fits"]
    tall = refused(capsys, "--gpu", "rtx4090", "--gpus", "16", "--data.seq_len", "131072")
    shorter = tall.split("data.seq_len to ")[1].split()[0]
    assert planned("--gpu", "rtx4090", "--gpus", "16", "--data.seq_len", shorter)["recommended"]["fits"]


def test_memory_savers_of_one_gpu(recipe, capsys):
    one = ("--gpus", "1", "--batch.packs", "1", "--data.seq_len", "2048")
    small = (*one, "--gpu", "rtx4090", "--model.config", "llama-3.2-1b")
    savers = ("--optim.parameters", "bf16", "--optim.moments", "bf16", "--parallel.offload", "optimizer")
    assert "optim.parameters and optim.moments = bf16, parallel.offload = optimizer" in refused(capsys, *small)
    assert planned(*small, *savers)["recommended"]["fits"]
    parts = {name: planned(*one, "--gpu", "b200", *options)["memory"]["full"]["parts_gib"] for name, options in {
        "all": savers, "moments": savers[2:4], "host": ("--parallel.offload", "parameters")}.items()}
    assert [parts["all"][part] for part in ("parameters", "moments")] == [pytest.approx(2 * N / GIB), 0]
    assert parts["moments"]["moments"] == pytest.approx(4 * N / GIB)
    assert [parts["host"][part] for part in ("parameters", "gradients", "moments")] == [0, 0, 0]


@pytest.mark.parametrize(("options", "message"), [
    (["--gpu", "h100pci"], "no GPU is called 'h100pci' (did you mean h100-pcie?); known are h100, h100-pcie, h200,"),
    (["--gpus", "6", "--parallel.shard", "4"], "--gpus 6 is not parallel.shard = 4 times parallel.replicate = 1"),
    (["--gpus", "64"], "batch.packs = 32 cannot be split over 64 GPUs; raise it to at least 64"),
    (["--train.precision", "fp32"], "the plan knows only the speed of bf16: add --train.precision bf16"),
    (["--model.config", "away.json"], "away.json: no such file; a Hugging Face model folder has a config.json. To plan "
     "without the weights: a folder with only the model's config.json, or --model.init random --model.config with one "
     "of llama-3-8b,"),
])
def test_what_cannot_be_planned_is_rejected(recipe, capsys, options, message):
    assert message in refused(capsys, *options)


@pytest.mark.parametrize("options", [["--gpus", "0"], ["--tokens", "5X"], ["--utilisation", "1.5"]])
def test_meaningless_options_are_rejected(recipe, options):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "r.toml", *options])
    assert stopped.value.code == 2


@pytest.mark.parametrize("name", ["h100", "h100-pcie", "h200", "a100", "a100-40", "b200", "l40s", "rtx4090"])
def test_hardware_is_plausible(name):
    """No sparse figure, no GB for GiB: products a byte of memory bandwidth lie between 100 and 450 on all of these."""
    gpu = find_gpu(name)
    assert 100 < gpu.bf16_tflops * 1e12 / (gpu.memory_gb_s * 1e9) < 450
    marketed = int(gpu.name.split()[-2])
    assert marketed * 0.92 < gpu.memory_gib <= marketed


def test_a_step_is_as_long_as_its_micro_batches(recipe):
    """40 packs over 8 GPUs by 2: two micro-batches of 2 and one of 1, and the optimizer; or what is sent."""
    found = planned("--batch.packs", "40", "--gpu", "h200", "--batch.micro_packs", "2")
    chosen = found["memory"]["none"]
    forward, backward = chosen["compute_seconds"]
    assert found["hidden"]
    assert chosen["micro_steps"] == 3
    optimizer = 28 * N / 8 / 4800e9
    assert chosen["step_seconds"] == pytest.approx(2.5 * (forward + backward) + optimizer)
    slow = planned("--batch.packs", "40", "--gpu", "h100-pcie", "--gpus", "40", "--utilisation", "1")
    assert not slow["hidden"]
    sent = slow["traffic"]["forward_seconds"] + slow["traffic"]["backward_seconds"]
    assert slow["recommended"]["step_seconds"] == pytest.approx(sent + 28 * N / 40 / 2000e9, rel=0.3)
    assert slow["recommended"]["step_seconds"] >= sent
