"""LoRA against peft: the same logits, losses and merged weights; and runs that begin, die and go on with it."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from small_runs import HERE, final_weights, log, options, train
from test_resume import SMALL, run_until_death
from torch._dynamo.testing import CompileCounterWithBackend

from minisft.config import LoraConfig
from minisft.generate.assistant import Assistant
from minisft.lora import adapters as lora
from minisft.lora.adapters import PeftFolder
from minisft.model.llama import Documents, Llama
from minisft.model.llama_config import read_config
from minisft.model.weights import SafetensorsFolder
from minisft.pretrained import from_pretrained, save_pretrained
from minisft.runs.lifecycle import main
from minisft.training import parallel
from minisft.versions import SHARDS_BYTES

KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
RUN = {"lora__rank": 4, "lora__base": "fp32", "train__max_steps": 10}
ORACLE = json.loads((HERE / "oracles" / "trl_curve.json").read_text(encoding="utf-8"))
IDS = torch.tensor(ORACLE["documents"][0]["ids"])


@pytest.fixture
def peft(monkeypatch):
    """The library; a torchao beside it that is too old for it must not matter."""
    pytest.importorskip("transformers")
    library = pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    return library


def theirs_of(base):
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)


def adapted(base, settings, *, seed=0, trained=True):
    """Our network with adapters whose B (and magnitudes) are no longer zero."""
    folder = SafetensorsFolder(base)
    with torch.device("meta"):
        model = Llama(read_config(base), dtype=torch.float32)
        lora.adapt(model, settings)
    model.to_empty(device="cpu")
    lora.load(model, folder, seed=seed)
    generator = torch.Generator().manual_seed(1)
    for _, module in lora.adapters(model) if trained else ():
        for parameter in (module.lora_B, *([module.lora_magnitude] if module.dora else [])):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, Documents.of_lengths((len(ids),)), lambda hidden, head: hidden @ head.float().T)


# The arithmetic, against peft


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_pefts_and_so_is_its_adapter(base, tmp_path, peft, kind):
    """Ten steps of plain AdamW on peft's model give the losses of our run; and peft loads what the run saved."""
    few = tmp_path / "few.jsonl"
    lines = (HERE / "oracles" / "conversations.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    few.write_text("".join(lines[:8]), encoding="utf-8")
    records = train(base, tmp_path, **RUN, **{f"lora__{key}": "true" for key in KINDS[kind]}, batch__packs=1000,
                    optim__lr=1e-2, data__train=few)
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=list(LoraConfig(4).targets), task_type="CAUSAL_LM",
                               use_rslora=kind == "rslora", use_dora=kind == "dora")
    model = peft.get_peft_model(theirs_of(base), settings)
    fresh = dict(lora.tensors(adapted(base, LoraConfig(4, base="fp32", **KINDS[kind]), trained=False)))
    peft.set_peft_model_state_dict(model, fresh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.95),
                                  weight_decay=0.0)
    losses, documents = [], ORACLE["documents"][:8]
    for _ in range(10):
        total = 0.0
        for document in documents:
            ids, trained = torch.tensor(document["ids"]), torch.tensor(document["trained"])
            after = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            loss = (after * trained[1:]).sum() / sum(map(sum, (d["trained"] for d in documents)))
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    torch.testing.assert_close([r["loss"] for r in records], losses, rtol=0, atol=2e-4)

    run = tmp_path / "run"
    loaded = peft.PeftModel.from_pretrained(theirs_of(base), run / "adapter")
    expected = loaded(IDS[None]).logits[0].detach()
    torch.testing.assert_close(from_pretrained(run / "final").logits(IDS), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(from_pretrained(run / "adapter").logits(IDS), expected, rtol=0, atol=2e-4)
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):  # so merged, it ends alike
        assert (run / "adapter" / name).read_bytes() == (run / "final" / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["model.layers.1.mlp.up_proj", "down_proj"]])
def test_an_adapter_of_pefts_is_read_as_peft_reads_it(base, tmp_path, peft, kind, targets):
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM",
                               use_rslora=kind == "rslora", use_dora=kind == "dora", init_lora_weights=False)
    model = peft.get_peft_model(theirs_of(base), settings)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.3
    model.save_pretrained(tmp_path)
    expected = model(IDS[None]).logits[0].detach()
    torch.testing.assert_close(from_pretrained(tmp_path).logits(IDS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stored", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_beside_are_the_same(base, tmp_path, kind, stored):
    """And with a base in 4 bits both are the network of the dequantised weights."""
    from safetensors.torch import load_file, save_file

    settings = LoraConfig(4, base=stored, targets=("q_proj", "layers.1.mlp.*"), **KINDS[kind])
    model = adapted(base, settings)
    beside = logits(model)
    save_pretrained(model, tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(from_pretrained(tmp_path / "merged").logits(IDS), beside, rtol=1e-3, atol=1e-3)

    frozen = {name: tensor.to(lora.STORED[stored]).float() for name, tensor in
              load_file(base / "model.safetensors").items()}
    bare = adapted(base, LoraConfig(1, base=stored, alpha=1e-30), trained=False)
    if stored == "nf4":
        for name, module in lora.adapters(bare):
            dense = frozen[f"{name}.weight"]
            frozen[f"{name}.weight"] = module.merged()
            assert 0 < float((module.merged() - dense).abs().max()) < 0.2 * float(dense.abs().max())
    folder = tmp_path / "dense"
    folder.mkdir()
    save_file(frozen, folder / "model.safetensors")
    (folder / "config.json").write_text((base / "config.json").read_text())
    torch.testing.assert_close(logits(bare), from_pretrained(folder).logits(IDS), rtol=1e-4, atol=1e-4)


def test_what_is_frozen_has_no_gradient_and_what_is_trained_has(base):
    model = adapted(base, LoraConfig(2, base="nf4", dora=True, targets=("o_proj",)))
    model(IDS, Documents.of_lengths((len(IDS),)), lambda hidden, head: (hidden @ head.float().T).square().mean()
          ).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"model.layers.{i}.self_attn.o_proj.lora_{part}" for i in (0, 1) for part in
                       ("A", "B", "magnitude")}
    assert all(model.get_parameter(name).grad.any() for name in trained)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8


def test_dropout_by_hand():
    """A share is zero, the rest is scaled up, tokens and channels differ; and the same draws drop the same."""
    draws = torch.randint(-2**31, 2**31, (400,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    channels = torch.randint(-2**31, 2**31, (300,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    found = lora.dropped(torch.ones(400, 300), draws, channels, 0.25)
    assert found.unique().tolist() == pytest.approx([0, 4 / 3])
    zero = (found == 0).double()
    assert float(zero.mean()) == pytest.approx(0.25, abs=0.005)
    centred = zero - zero.mean()
    for axis in (0, 1):  # no two rows and no two columns go together: correlations are those of chance
        rows = centred if axis == 0 else centred.T
        together = (rows @ rows.T) / rows.shape[1] / 0.1875
        together.fill_diagonal_(0)
        assert float(together.abs().max()) < 6 / rows.shape[1] ** 0.5
    assert torch.equal(lora.dropped(torch.ones(7, 300), draws[5:12], channels, 0.25), found[5:12])
    assert torch.equal(lora.dropped(torch.ones(400, 300), draws, channels, 0.0), torch.ones(400, 300))


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("settings", [LoraConfig(4, base="fp32"), pytest.param(
    LoraConfig(4, base="nf4", dora=True, dropout=0.1), marks=pytest.mark.slow)])
def test_compiled_blocks_are_two_graphs_without_breaks(base, monkeypatch, settings, recompute):
    """One for the first block, whose input needs no gradient, one for all others; they compute what eager ones do."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model = adapted(base, settings)
        model.recompute = recompute
        lora.set_step(model, seed=0, step=3)
        if compiled:
            parallel.compile_blocks(model)
        for lengths in ((96,), (40, 56)):
            documents = replace(Documents.of_lengths(lengths), ids=torch.arange(96, dtype=torch.int32))
            model(torch.arange(96), documents, lambda x, head: (x @ head.float().T).square().mean()).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert counter.frame_count == 2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_each_step_drops_its_own_and_nothing_is_dropped_without_gradients(base):
    model, plain = (adapted(base, LoraConfig(4, base="fp32", dropout=share)) for share in (0.3, 0.0))
    documents = replace(Documents.of_lengths((len(IDS),)), ids=torch.full((len(IDS),), 7, dtype=torch.int32))

    def output(model):
        return model(IDS, documents, lambda hidden, head: hidden)

    with pytest.raises(AssertionError, match=r"call adapters\.set_step"):
        output(model)
    found = []
    for step in (0, 1, 0):
        lora.set_step(model, seed=5, step=step)
        found.append(output(model))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    with torch.no_grad():
        assert torch.equal(output(model), output(plain))
        assert not torch.equal(found[0], output(plain))
    assert torch.equal(output(model.eval()), output(plain))


def test_doras_small_gains_are_not_rounded_away():
    """In bf16, gains that are nearer to 1 than the next bf16 number: per row, what comes out over what went in, in
    float64, follows them."""
    torch.manual_seed(0)
    layer = lora.FrozenLinear(torch.nn.Linear(256, 512, bias=False), LoraConfig(rank=8, dora=True), rank=8,
                              trained=torch.float32)
    x, gain = torch.randn(2048, 256).bfloat16(), 1 + 7e-4 * torch.randn(512)
    with torch.no_grad():
        layer.weight.normal_(std=0.06)
        layer.lora_A.normal_(std=0.06)
        layer.lora_B.normal_(std=1e-3)
        lengths = layer.sum(layer.weight, layer.lora_A, layer.lora_B).norm(dim=1)
        layer.lengths.copy_(lengths)
        layer.lora_magnitude.copy_(lengths * (gain - 1))
        found = layer(x).double()
        plain = x.double() @ layer.sum(layer.weight, layer.lora_A, layer.lora_B).double().T
    reached = (found * plain).sum(dim=0) / plain.square().sum(dim=0) - 1
    wanted = (gain - 1).double()
    assert float((reached * wanted).sum() / wanted.square().sum()) > 0.9  # 0.1 where the gain itself is rounded


# Whole runs


@pytest.fixture(scope="module")
def references(base, tmp_path_factory):
    """Runs that the others are held against, by their settings."""
    done = {}

    def run(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            done[name] = train(base, folder, **RUN | RUNS[name]), final_weights(folder), folder
        return done[name]

    return run


RUNS = {"lora": {}, "nf4": {"lora__base": "nf4", "lora__dora": "true", "lora__dropout": 0.1,
                            "train__precision": "bf16"}}


@pytest.mark.parametrize(("kind", "change"), [
    ("lora", {"batch__micro_packs": 3}),
    *(pytest.param(kind, change, marks=pytest.mark.slow) for kind, change in (
        ("lora", {"ranks": 2}), ("lora", {"parallel__activation_checkpointing": "full"}),
        ("lora", {"parallel__activation_checkpointing": "selective"}), ("nf4", {"ranks": 2}),
        ("nf4", {"batch__micro_packs": 3}), ("nf4", {"parallel__activation_checkpointing": "selective"}),
        ("nf4", {"parallel__activation_checkpointing": "full"})))])
def test_ranks_accumulation_and_recomputation_change_nothing(base, tmp_path, references, kind, change):
    """With dropout too, which is drawn by token: in bf16 to its rounding, which ranks and packs change."""
    if kind == "nf4" and "ranks" in change and not SHARDS_BYTES:
        pytest.skip("this torch cannot shard bytes, which is refused")
    records, weights, _ = references(kind)
    changed = train(base, tmp_path, **{**RUN, **RUNS[kind], **change})
    tolerance = 1e-5 if kind == "lora" else 5e-3
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close([r[key] for r in changed], [r[key] for r in records], rtol=10 * tolerance
                                   if key == "grad_norm" else tolerance, atol=tolerance)
    for name, weight in final_weights(tmp_path).items():
        torch.testing.assert_close(weight.float(), weights[name].float(), rtol=0, atol=2e-5 if kind == "lora" else 0.1)


@pytest.mark.parametrize("change", [RUNS["nf4"], {"optim__moments": "bf16", "lora__dropout": 0.2}])
def test_a_run_that_died_goes_on_bit_for_bit(base, tmp_path, monkeypatch, capsys, change):
    settings = {**SMALL, "train__max_steps": 5, **{**RUN, **change, "train__max_steps": 5}}
    whole = train(base, tmp_path / "whole", **settings), final_weights(tmp_path / "whole")
    run_until_death(monkeypatch, options(base, tmp_path / "died", **settings), step=4, micro_batches=4)
    train(base, tmp_path / "died", **settings)
    assert "resuming from" in capsys.readouterr().out
    assert [r["loss"] for r in log(tmp_path / "died")] == [r["loss"] for r in whole[0]]
    assert all(torch.equal(weight, whole[1][name]) for name, weight in final_weights(tmp_path / "died").items())
    saved = next((tmp_path / "died" / "run" / "checkpoints").glob("step-*/rank-0.safetensors"))
    assert saved.stat().st_size < 300_000  # adapters and their moments; the model has 127 thousand numbers


def test_other_adapters_or_another_base_are_another_run(base, tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file

    settings = {**SMALL, **RUN, "train__max_steps": 5}
    run_until_death(monkeypatch, options(base, tmp_path, **settings), step=4, micro_batches=4)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((base / name).read_bytes())
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(weights, other / "model.safetensors")
    for change, message in (({"lora__rank": 8}, "lora.rank: was 4, is 8"), ({"lora__rank": 0, "lora__base": "bf16"},
                            "lora.rank: was 4, is None"), ({"model__path": other}, "base: was")):
        assert main(options(base, tmp_path, **{**settings, **change})) == 2
        assert message in capsys.readouterr().err


def test_the_start_says_what_is_trained(base, tmp_path, capsys):
    train(base, tmp_path, **{**RUN, "lora__base": "nf4", "lora__targets": "q_proj,v_proj", "train__max_steps": 1})
    trained = 2 * 4 * ((64 + 64) + (64 + 32))
    assert f"LoRA of rank 4: {trained:,} of {127_296 + trained:,} parameters are trained" in capsys.readouterr().out


def test_exports_along_the_way_have_their_adapters(base, tmp_path):
    train(base, tmp_path, **{**RUN, "train__max_steps": 4, "checkpoint__export_every": 2})
    exports = tmp_path / "run" / "exports"
    assert {path.name for path in exports.iterdir()} == {"step-000002", "step-000002-adapter"}
    merged, beside = (from_pretrained(exports / name).logits(IDS) for name in ("step-000002",
                                                                                     "step-000002-adapter"))
    torch.testing.assert_close(merged, beside, rtol=0, atol=1e-4)
    assistant = Assistant.load(exports / "step-000002-adapter")
    assert torch.equal(assistant.model.logits(IDS), beside)


# What cannot be


@pytest.mark.parametrize(("change", "message"), [
    ({"lora__targets": "q_proj,qproj,layers.7.*"}, "lora.targets: 'qproj' matches none of the 14 matrices"),
    ({"lora__targets": "q_proj,lm_head"}, "'lm_head' matches none of the 14 matrices; the embedding and the head have "
     "no adapters: train them with everything else, lora.rank = 0"),
    ({"lora__rank": 2**62}, "--lora.rank: expected int >= 0 and <= 65536, got 4611686018427387904"),
    ({"lora__rank": 65}, "lora.rank: 65 is more than the 64 that a matrix of this model can"),
    ({"lora__targets": ""}, "lora.targets: empty, so nothing would be trained"),
    ({"lora__rank": 0, "lora__alpha": 8}, "lora.rank: is 0, so the other keys of [lora] do nothing"),
    ({"lora__dropout": 1}, "--lora.dropout: expected float >= 0 and < 1"),
    ({"lora__base": "int8"}, "--lora.base: expected bf16|fp32|nf4"),
    ({"lora__base": "nf4", "parallel__offload": "parameters"}, "an nf4 base stays on the device"),
    ({"lora__dropout": 0.1, "parallel__offload": "parameters"}, "dropout and DoRA keep tensors on the device"),
    ({"lora__dora": "true", "parallel__offload": "parameters"}, "dropout and DoRA keep tensors on the device"),
    ({"model__init": "random", "model__config": "llama-3-8b"}, "adapters change what a pretrained model does, and "),
])
def test_what_cannot_be_is_refused(base, tmp_path, capsys, change, message):
    assert main(options(base, tmp_path, **{**RUN, **change})) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{}, {"lora__base": "nf4"}, {"lora__base": "fp32", "lora__dora": "true"},
                                    {"lora__rank": 0, "lora__base": "bf16"}])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_base_with_a_number_that_is_not_finite_is_refused(base, tmp_path, capsys, change, name):
    from safetensors.torch import load_file, save_file

    spoilt = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(spoilt / "model.safetensors")
    tensors[name].view(-1)[7] = float("nan")
    save_file(tensors, spoilt / "model.safetensors")
    assert main(options(spoilt, tmp_path, **{**RUN, **change})) == 3
    assert f"model.safetensors: {name} has numbers that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / "final").exists()


def test_every_pattern_without_a_match_is_named(base, tmp_path, capsys):
    assert main(options(base, tmp_path, **{**RUN, "lora__targets": "a,q_proj,b"})) == 2
    printed = capsys.readouterr().err
    assert "'a' matches none" in printed
    assert "'b' matches none" in printed


@pytest.mark.parametrize(("change", "message"), [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA', which is not understood"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"r": "many"}, "not the settings of an adapter (ValueError"), ({"r": 8}, "does not fit the base model"),
    ({"r": 0}, "not the settings of an adapter (ZeroDivisionError"),
    *(({"lora_alpha": alpha}, "not the settings of an adapter (ValueError: lora_alpha is")
      for alpha in (float("inf"), float("nan"), "Infinity", 1e300)),
    ({"r": 10**400}, "not the settings of an adapter (OverflowError"),
    ({"strange\x1b[2J": "\n" * 10**5}, "strange\\x1b[2J is '\\n\\n"),
    ({"use_dora": True}, "does not fit the base model"),
    ({"base_model_name_or_path": "meta-llama/Llama-3"}, "its base model 'meta-llama/Llama-3' is not a folder here"),
])
def test_an_adapter_that_is_something_else_is_refused(base, tmp_path, references, change, message):
    from minisft.errors import UserError

    source = references("lora")[2] / "run" / "adapter"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**found, **change}))
    with pytest.raises(UserError) as caught:
        from_pretrained(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("base_model.model.lm_head.lora_A.weight", 0, "the adapter of lm_head is not of a matrix in a layer; merge it with "
     "peft (merge_and_unload)"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", 0, "embed_tokens.lora_embedding_A is no part of a linear "
     "matrix's adapter; merge it with peft (merge_and_unload)"),
    ("\x1b[2J" * 1000, 0, "adapter_model.safetensors: \\x1b[2J"),
    ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", float("nan"),
     "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has numbers that are not finite"),
])
def test_a_tensor_that_no_adapter_can_have_is_refused(base, tmp_path, key, value, message):
    from safetensors.torch import save_file

    from minisft.errors import NumericsError, UserError

    save_file({key: torch.full((1, 64), value), "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight":
               torch.zeros(64, 1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1,
                                                              "base_model_name_or_path": str(base)}))
    with pytest.raises((UserError, NumericsError)) as caught:
        from_pretrained(tmp_path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


@pytest.mark.parametrize(("kept", "settings", "message"), [
    ("nothing", {}, "adapter_model.safetensors lacks the adapters of 14 matrices, the first of model.layers.0."),
    (".layers.0.", {}, "lacks the adapters of 7 matrices, the first of model.layers.1.self_attn.q_proj; get all of it"),
    (".layers.0.", {"target_modules": ["model.layers.1.mlp.up_proj", "q_proj"]}, "of 2 matrices"),
    (".layers.0.", {"layers_to_transform": 0}, ""), (".layers.0.", {"target_modules": r".*layers\.0\..*"}, ""),
    ("_proj", {}, ""), ("q_proj", {"exclude_modules": ["[^q]_proj"]}, "")])
def test_an_adapter_that_lacks_matrices_is_refused(base, tmp_path, references, kept, settings, message):
    from safetensors.torch import load_file, save_file

    from minisft.errors import UserError

    source = references("lora")[2] / "run" / "adapter"
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if kept in name}, tmp_path / "adapter_model.safetensors")
    found = json.loads((source / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**found, **settings}))
    if not message:
        from_pretrained(tmp_path)
        return
    with pytest.raises(UserError) as caught:
        from_pretrained(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [
    (None, "not a readable safetensors file (No such file or directory"), (b"", "not a readable safetensors file"),
    (b"garbage" * 10, "not a readable safetensors file"), ("pipe", "a pipe or a device, not a regular file"),
    ("bin", "adapter_model.bin is a pickle, which is not read, since it can run code: load it with peft")])
def test_an_adapter_without_its_tensors_is_refused(tmp_path, base, content, message):
    from minisft.errors import UserError

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1,
                                                              "base_model_name_or_path": str(base)}))
    if content == "pipe":
        os.mkfifo(tmp_path / "adapter_model.safetensors")
    elif content == "bin":
        (tmp_path / "adapter_model.bin").touch()
    elif content is not None:
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model.safetensors: ") as caught:
        PeftFolder(tmp_path)
    assert message in str(caught.value)
