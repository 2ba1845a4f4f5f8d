"""`minisft plan` prints what follows from its assumptions; the oracle is arithmetic by hand, or by NumPy."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from minisft.__main__ import main
from minisft.model.flops import known_gpus
from minisft.model.llama_config import PRESETS
from minisft.planning.estimate import Traffic, chosen_gpu, find_gpu

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


def test_fp8_computes_faster_and_takes_the_same_memory(recipe):
    bf16, fp8 = (planned("--tokens", "50M", "--train.precision", precision) for precision in ("bf16", "fp8"))
    for policy in ("none", "selective", "full"):
        before, after = bf16["memory"][policy], fp8["memory"][policy]
        assert sum(after["compute_seconds"]) == pytest.approx(sum(before["compute_seconds"]) / 1.2)
        assert after["allocated_gib"] == before["allocated_gib"]


def test_a_run_of_uneven_steps_takes_the_time_of_its_tokens(recipe, base):
    """Eleven full packs in steps of at most ten are a step of six and one of five, not two of ten."""
    Path("nowhere.jsonl").write_text(json.dumps({"text": "abc" * 300}) + "\n" + "".join(
        json.dumps({"text": f"{number} " + "word " * 300}) + "\n" for number in range(40)))
    found = planned("--model.tokenizer", str(base), "--gpus", "1", "--gpu", "h200",
                    "--data.template", "text", "--data.seq_len", "2048", "--batch.packs", "10", "--train.epochs", "1",
                    "--model.config", "llama-3.2-1b")
    assert not found["assumed"]
    best = found["recommended"]
    assert found["hours"] == pytest.approx(found["tokens"] / best["tokens_per_second_per_gpu"] / 3600)
    assert found["hours"] < found["steps"] * best["step_seconds"] / 3600


def test_the_plan_says_what_its_time_leaves_out(recipe, capsys):
    for offload, said in (("none", False), ("optimizer", True)):
        assert main(["plan", "r.toml", "--tokens", "1M", "--parallel.offload", offload]) == 0
        assert (", and what offloading moves" in (out := " ".join(capsys.readouterr().out.split()))) is said
        assert "leave out evaluation and checkpoints" in out


def test_remedies_in_fp8_are_accepted_by_the_configuration(recipe, capsys):
    error = refused(capsys, "--gpu", "rtx4090", "--gpus", "2", "--train.precision", "fp8", "--tokens", "1M")
    assert "--lora.base nf4" in error
    for _, _, keys in remedies(error):
        precision = [] if "--train.precision" in keys else ["--train.precision", "fp8"]
        gpus = [] if "--gpus" in keys else ["--gpus", "2"]
        assert planned("--gpu", "rtx4090", "--tokens", "1M", *keys, *gpus, *precision)


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
    assert found["hours"] == pytest.approx(found["tokens"] / best["tokens_per_second_per_gpu"] / 8 / 3600)
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


def test_packs_that_gpus_share_by_hand(recipe, capsys):
    """131,072 tokens of Llama-3.1-8B over 8 H100s: each computes an eighth of a pack, exchanges heads for tokens three
    times in 32 layers (queries, keys and values, results; recomputed), and keeps 16,384 tokens."""
    long = ("--model.config", "llama-3.1-8b", "--data.seq_len", "131072", "--batch.packs", "8", "--utilisation", "0.4")
    error = refused(capsys, *long)
    assert "--parallel.context 2 --parallel.activation_checkpointing full" in error
    found = planned(*long, "--parallel.context", "8")
    best = found["recommended"]
    assert best["activation_checkpointing"] == "selective"
    assert (found["packs_per_gpu"], best["micro_packs"], best["micro_steps"]) == (8, 1, 8)
    sent = 32 * 3 * 7 / 8 * 16_384 * (32 + 8 + 8 + 32) * 128 * 2
    assert best["exchanged"] == pytest.approx(sent)
    assert best["exchange_seconds"] == pytest.approx(sent / (0.75 * 450e9))
    flops = found["flops_per_token"]["selective"]
    assert sum(best["compute_seconds"]) == pytest.approx(flops * 16_384 / (0.4 * 989e12))
    assert best["step_seconds"] == pytest.approx(
        8 * (sum(best["compute_seconds"]) + best["exchange_seconds"]) + 28 * N / 8 / 3350e9)
    # Kept of each layer and token: input, q, k, v, attention, o, gate; lse. Of the last block, again: all of it, with
    # attention also as it comes back, less that; its gradients.
    kept, alike = 2 * (4 * 4096 + 2 * 1024 + 14_336) + 4 * 32, 2 * (7 * 4096 + 2 * 1024 + 4 * 14_336) + 4 * 32 + 8
    again = alike - kept + 2 * 2 * 14_336 + 2 * 2 * 4096
    assert best["instant"] == "last block"
    assert best["parts_gib"]["activations"] == pytest.approx(16_384 * (32 * kept + 2 * 4096 + again) / GIB)
    assert "each pack shared by 8" in capsys.readouterr().out
    assert planned("--parallel.context", "16", "--gpus", "16", "--batch.packs", "1")["packs_per_gpu"] == 1


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
    assert "8 x GeForce RTX 4090 24 GB, which has 22.1 GiB usable\nEach of these fits, one pack at a time" in error
    assert "more GPUs: --gpus 16" in error
    assert "Take larger GPUs" in refused(capsys, "--gpu-memory", "2", "--tflops", "50")


def remedies(error):
    """[(what, GiB, options)] of the message, in its order."""
    return [(found[2], float(found[1]), found[3].split())
            for found in re.finditer(r"^ +([0-9.]+)  (.+): (--.*)$", error, re.MULTILINE)]


@pytest.mark.parametrize(("base", "expected"), [
    (["--gpu", "rtx4090", "--gpus", "1", "--data.seq_len", "4096"], ["QLoRA", "LoRA", "bf16, all parameters",
                                                                         "more GPUs"]),
    (["--gpu", "a6000", "--gpus", "1"], ["QLoRA", "LoRA", "bf16, moments", "more GPUs"]),
    (["--gpu", "h100", "--gpus", "1"], ["QLoRA", "LoRA", "bf16, updated in the backward pass", "bf16, moments",
                                        "more GPUs"]),
    (["--gpu", "h100", "--gpus", "2"], ["QLoRA", "LoRA", "bf16 moments", "more GPUs", "shorter packs"]),
    (["--gpu", "a100", "--gpus", "1", "--model.config", "llama-3.1-405b", "--batch.packs", "1"],
     ["bf16, all parameters", "QLoRA on more GPUs"]),
    (["--gpu", "a100-40", "--gpus", "2", "--parallel.shard", "2", "--batch.packs", "2", "--batch.micro_packs", "2",
      "--parallel.activation_checkpointing", "selective"], [
          "QLoRA", "LoRA", "bf16, updated in the backward pass", "bf16, moments", "more GPUs"]),
], ids=["4090", "A6000", "H100", "2 H100", "405B", "2 A100"])
def test_every_remedy_is_enough(recipe, capsys, base, expected):
    """The plan with a remedy's own options fits, in the memory that was promised, one pack at a time."""
    found = remedies(refused(capsys, *base))
    assert [what.split(" (")[0] for what, _, _ in found] == expected
    for _, gib, options in found:
        given = dict(zip(base[::2], base[1::2], strict=True)) | dict(zip(options[::2], options[1::2], strict=True))
        plan = planned(*(text for pair in given.items() for text in pair))
        memory = plan["memory"][plan["activation_checkpointing"]]
        assert (memory["micro_packs"], memory["fits"]) == (1, True)
        assert memory["reserved_gib"] == pytest.approx(gib, abs=0.06)


def test_what_the_remedies_leave_of_8b_by_hand(recipe, capsys):
    """LoRA keeps 2 bytes a parameter, and 16 of an adapter's; bf16 with moments on the host, 4 bytes; parameters on the
    host, none, but the gathered head and the buffer that it arrived in."""
    one = ("--gpu", "b300", "--gpus", "1", "--batch.packs", "2", "--data.seq_len", "4096", "--model.config",
           "llama-3-8b")
    sides = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), *[(4096, 14_336)] * 3]
    adapters = 32 * sum(16 * (rows + columns) for rows, columns in sides)
    parts = {name: planned(*one, *options)["memory"]["full"]["parts_gib"] for name, options in {
        "lora": ["--lora.rank", "16"], "moments": ["--optim.parameters", "bf16", "--parallel.offload", "optimizer"],
        "all": ["--parallel.offload", "parameters"]}.items()}
    state = {name: GIB * sum(found[part] for part in ("parameters", "gradients", "moments"))
             for name, found in parts.items()}
    assert state["lora"] == pytest.approx(2 * N + 16 * adapters)
    assert state["moments"] == pytest.approx(4 * N)
    assert state["all"] == 0
    assert parts["all"]["gathered"] * GIB == pytest.approx(2 * 2 * VOCABULARY)


def test_adapters_are_planned_before_the_model_is_there(recipe, capsys):
    """For a shipped recipe with random weights, or without its folder, its preset is taken, and the plan says so."""
    for options in (["--model.init", "random"], []):
        assert main(["plan", "llama3-8b-qlora", "--gpu", "RTX 4090", "--gpus", "1", *options]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "41,943,040 trained beside 8.03B parameters over 1 of 1 x GeForce RTX 4090 24 GB" in printed
        assert "model Meta-Llama-3-8B is missing: planned as the preset llama-3-8b" in printed
    assert main(["plan", "--model.path", "meta-llama/Llama-3.2-1B-Instruct", "--data.train", "x.jsonl"]) == 0
    assert "planned as the preset llama-3.2-1b" in capsys.readouterr().out
    assert main(["plan", "r.toml", "--lora.rank", "8"]) == 0
    assert "missing: planned as" not in capsys.readouterr().out


def test_data_without_their_tokenizer_are_not_counted(recipe, capsys):
    Path("here.jsonl").write_text('{"messages": []}')
    assert main(["plan", "llama3-8b", "--data.train", "here.jsonl"]) == 0
    assert "all tokens trained; Meta-Llama-3-8B is missing" in " ".join(capsys.readouterr().out.split())
    assert planned("--data.train", "here.jsonl")["assumed"].endswith("model.tokenizer is missing")


@pytest.mark.parametrize(("preset", "documents", "options", "measured"), [
    ("llama-3.2-1b", 1, [], (69_741, 27.0)),
    ("llama-3.2-1b", 4, [], (72_729, None)),
    ("llama-3.2-1b", 2, [], (None, 31.6)),  # train.py itself
    ("llama-3-8b", 1, ["--lora.rank", "16"], (17_556, 50.3)),
    ("llama-3-8b", 1, ["--lora.rank", "16", "--parallel.activation_checkpointing", "selective"], (15_235, 33.5)),
    ("llama-3-8b", 1, ["--optim.parameters", "bf16", "--optim.moments", "bf16", "--optim.in_backward", "true",
                       "--optim.clip_norm", "0", "--parallel.activation_checkpointing", "selective"], (11_740, 64.6)),
], ids=["1B", "1B, 4 packs", "1B, 2 packs", "LoRA", "LoRA, selective", "8B, bf16"])
def test_the_plan_agrees_with_what_an_h200_did(recipe, preset, documents, options, measured):
    """docs/performance.md: tokens/s within a fifth, GiB allocated within 3%; packs of 8,192 tokens, one in a pass."""
    found = planned("--gpu", "h200", "--gpus", "1", "--batch.packs", str(documents), "--document-length", "500",
                    "--model.config", preset, *options)
    assert found["utilisation"] == 0.5
    chosen = found["memory"][found["activation_checkpointing"]]
    speed, gib = measured
    if speed:
        assert chosen["tokens_per_second_per_gpu"] == pytest.approx(speed, rel=0.2)
    if gib:
        assert chosen["allocated_gib"] == pytest.approx(gib, rel=0.03)


def test_updates_in_the_backward_pass_have_one_micro_batch(recipe):
    """Training refuses more, so the plan proposes none."""
    found = planned("--gpu", "b300", "--batch.packs", "16", "--gpus", "4", "--optim.in_backward", "true",
                    "--optim.clip_norm", "0", "--data.seq_len", "1024")
    assert {choice["micro_packs"] for choice in found["memory"].values()} == {4}
    assert (found["recommended"]["micro_packs"], found["recommended"]["micro_steps"]) == (4, 1)


@pytest.mark.parametrize(("name", "key"), [
    ("H100", "h100"), ("NVIDIA H100 80GB HBM3", "h100"), ("h100 pcie", "h100-pcie"), ("RTX 4090", "rtx4090"),
    ("rtx4090", "rtx4090"), ("4090", "rtx4090"), ("GeForce RTX 3090", "rtx3090"), ("RTX-A6000", "a6000"), ("l4", "l4"),
    ("A10", "a10"), ("A100 40GB", "a100-40"), ("a100", "a100"), ("MI300X", "mi300x"), ("NVIDIA B300 SXM6 AC", "b300"),
])
def test_a_gpu_has_many_names(name, key):
    assert find_gpu(name) == find_gpu(key)


def test_a_card_that_is_not_listed(recipe):
    found = planned("--gpu-memory", "96", "--tflops", "250", "--gpus", "1", "--lora.rank", "8")
    assert found["gpu"]["name"] == "GPU (96 GiB, 250 TFLOP/s, as given)"
    assert found["usable_gib"] == 94.5
    changed, listed, best = chosen_gpu("4090", memory_gib=48), find_gpu("4090"), found["recommended"]
    assert (changed.memory_gib, changed.bf16_tflops, changed.link) == (48, listed.bf16_tflops, listed.link)
    assert chosen_gpu(None) == find_gpu("h100")
    flops = found["flops_per_token"][best["activation_checkpointing"]] * 8192 * best["micro_packs"]
    assert sum(best["compute_seconds"]) == pytest.approx(flops / (0.5 * 250e12))


def test_memory_savers_of_one_gpu(recipe, capsys):
    one = ("--gpus", "1", "--batch.packs", "1", "--data.seq_len", "2048")
    small = (*one, "--gpu", "rtx4090", "--model.config", "llama-3.2-1b")
    savers = ("--optim.parameters", "bf16", "--optim.moments", "bf16", "--parallel.offload", "optimizer")
    assert "bf16 moments: --optim.moments bf16\n" in refused(capsys, *small)
    assert planned(*small, *savers)["recommended"]["fits"]
    parts = {name: planned(*one, "--gpu", "b200", *options)["memory"]["full"]["parts_gib"] for name, options in {
        "all": savers, "moments": savers[2:4], "host": ("--parallel.offload", "parameters")}.items()}
    assert [parts["all"][part] for part in ("parameters", "moments")] == [pytest.approx(2 * N / GIB), 0]
    assert parts["moments"]["moments"] == pytest.approx(4 * N / GIB)
    assert [parts["host"][part] for part in ("parameters", "gradients", "moments")] == [0, 0, 0]


@pytest.mark.parametrize(("options", "message"), [
    (["--gpu", "h100pci"], "no GPU is called 'h100pci' (did you mean h100-pcie?); known are h100, h100-pcie, h200,"),
    (["--gpu", "H20"], "no GPU is called 'H20' (did you mean h200?)"),
    (["--gpu", "rtx"], "--gpu: 'rtx' may be rtx4090 or rtx5090 or rtx3090 or a6000; name one of them"),
    (["--gpu", "RTX 3090 Ti"], "(did you mean rtx3090?); known are h100, h100-pcie, h200, a100, a100-40, b200, b300, "
     "mi300x, l40s, rtx4090, rtx5090, rtx3090, a6000, l4, a10. For another, give --gpu-memory and --tflops instead"),
    (["--gpu-memory", "24"], "for a card that is not listed give both --gpu-memory and --tflops; to change one of them "
     "on a listed card, name it with --gpu: h100,"),
    (["--gpus", "6", "--parallel.shard", "4"], "--gpus 6 is not parallel.shard = 4 times parallel.replicate = 1"),
    (["--gpus", "64"], "batch.packs = 32 cannot be split over 64 GPUs; raise it to at least 64"),
    (["--parallel.context", "3"], "--gpus 8 is no multiple of parallel.context = 3, the GPUs that share a pack; take "
     "a multiple, or change it"),
    (["--gpus", "6", "--parallel.context", "3"], "the network's 32 query heads and 8 key/value heads cannot be divided "
     "evenly over 3 ranks; set it to one of 1, 2, 4, 8, 16, 32"),
    (["--gpus", "64", "--parallel.context", "2", "--batch.packs", "31"], "raise it to at least 32, or take fewer GPUs"),
    (["--train.precision", "fp32"], "the plan knows only the speed of bf16 and fp8: add --train.precision bf16"),
    (["--model.config", "away.json"], "away.json: no such file; a Hugging Face model folder has a config.json. To plan "
     "without the weights: a folder with only the model's config.json, or add --model.init random --model.config "
     "llama-3-8b (or llama-3-70b,"),
])
def test_what_cannot_be_planned_is_rejected(recipe, capsys, options, message):
    assert message in refused(capsys, *options)


@pytest.mark.parametrize("options", [["--gpus", "0"], ["--gpu-memory", "0"], ["--tflops", "-1"],
                                     ["--tokens", "5X"], ["--utilisation", "1.5"]])
def test_meaningless_options_are_rejected(recipe, options):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "r.toml", *options])
    assert stopped.value.code == 2


@pytest.mark.parametrize("name", known_gpus())
def test_hardware_is_plausible(name):
    """No sparse figure, no GB for GiB: products a byte of memory bandwidth lie between 70 and 450 on all of these."""
    gpu = find_gpu(name)
    assert 70 < gpu.bf16_tflops * 1e12 / (gpu.memory_gb_s * 1e9) < 450
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
