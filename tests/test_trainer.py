"""The loop as a whole, against TRL's; and ranks, accumulation and packing never change the mathematics."""

import json

import pytest
import torch
from small_runs import HERE, final_weights, log, options, train

from minisft import config_io
from minisft.generate.assistant import generate
from minisft.prepare import prepare
from minisft.pretrained import from_pretrained
from minisft.runs import lifecycle
from minisft.runs.lifecycle import main
from minisft.training import loop
from minisft.training.loss import masked_cross_entropy

ORACLE = json.loads((HERE / "oracles" / "trl_curve.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("packing", [
    {"data__seq_len": 512}, pytest.param({"data__seq_len": 1024, "batch__micro_packs": 2}, marks=pytest.mark.slow)])
def test_follows_trl(base, tmp_path, packing):
    """Full-batch training gives TRL SFTTrainer's losses and gradient norms (make_trl_curve.py), step by step."""
    records = train(base, tmp_path, batch__packs=1000, train__max_steps=12, **packing)
    curve = ORACLE["curves"]["full_batch"]
    assert [r["target_tokens"] for r in records] == [ORACLE["target_tokens"]] * 12
    torch.testing.assert_close([r["loss"] for r in records], curve["losses"], rtol=0, atol=2e-5)
    torch.testing.assert_close([r["grad_norm"] for r in records], curve["grad_norms"], rtol=0, atol=5e-5)


@pytest.fixture(scope="module")
def one_rank(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return train(base, folder), final_weights(folder)


@pytest.mark.parametrize("change", [
    {"ranks": 2}, pytest.param({"ranks": 3}, marks=pytest.mark.slow), {"batch__micro_packs": 4},
    {"batch__micro_packs": 3}, {"parallel__activation_checkpointing": "full"},
    pytest.param({"ranks": 2, "parallel__activation_checkpointing": "selective"}, marks=pytest.mark.slow)])
def test_ranks_and_accumulation_change_nothing(base, tmp_path, one_rank, change):
    """The same losses, norms and weights over ten steps on 1, 2 or 3 ranks, and with micro-batches of any size."""
    records, weights = one_rank
    changed = train(base, tmp_path, **change)
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close([r[key] for r in changed], [r[key] for r in records], rtol=1e-5, atol=1e-5)
    for key in ("epoch", "tokens", "target_tokens", "lr"):
        assert [r[key] for r in changed] == [r[key] for r in records]
    for name, weight in final_weights(tmp_path).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-5)


def test_bf16_follows_fp32(base, tmp_path, one_rank):
    """bf16 compute with fp32 masters follows the fp32 run: rounding, not drift."""
    records = train(base, tmp_path, train__precision="bf16")
    exact = [r["loss"] for r in one_rank[0]]
    assert [r["loss"] for r in records] == pytest.approx(exact, rel=5e-3)
    assert [r["loss"] for r in records] != exact


@pytest.mark.slow
def test_random_weights_are_the_same_on_any_number_of_ranks(base, tmp_path):
    settings = {"model__path": "", "model__init": "random", "model__config": base / "config.json",
                "model__tokenizer": base, "train__max_steps": 2}
    one, two = train(base, tmp_path / "1", **settings), train(base, tmp_path / "2", ranks=2, **settings)
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-6)


def test_heldout_losses_are_those_of_single_documents(base, tmp_path):
    """The eval records against a plain loop over the documents with the reference loss, before and after training."""
    heldout = tmp_path / "heldout.jsonl"
    lines = (HERE / "oracles" / "conversations.jsonl").read_text().splitlines()
    heldout.write_text("\n".join(lines[:5]))
    train(base, tmp_path, data__eval=heldout, eval__every=2, train__max_steps=5)
    records = log(tmp_path, "eval")
    assert [(r["step"], r["name"]) for r in records] == [(step, "heldout") for step in (0, 2, 4, 5)]
    for folder, record in ((base, records[0]), (tmp_path / "run" / "final", records[-1])):
        model, total, count = from_pretrained(folder), 0.0, 0
        for document in ORACLE["documents"][:5]:
            ids, trained = torch.tensor(document["ids"]), torch.tensor(document["trained"])
            targets = torch.where(trained[1:] > 0, ids[1:], -100)
            kept = int((targets >= 0).sum())
            total, count = total + float(masked_cross_entropy(model.logits(ids)[:-1], targets)) * kept, count + kept
        assert record["target_tokens"] == count
        assert record["loss"] == pytest.approx(total / count, abs=1e-5)


def test_the_final_folder_is_transformers(base, tmp_path):
    """No missing or unexpected key, the same logits, the same greedy answer, the template as Jinja."""
    transformers = pytest.importorskip("transformers")
    train(base, tmp_path, train__max_steps=3)
    final = tmp_path / "run" / "final"
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(final, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, tokenizer = from_pretrained(final), transformers.AutoTokenizer.from_pretrained(final)
    document = ORACLE["documents"][0]
    ids = torch.tensor(document["ids"])
    torch.testing.assert_close(ours.logits(ids), theirs(ids[None]).logits[0].detach(), rtol=0, atol=1e-4)
    messages = json.loads((HERE / "oracles" / "conversations.jsonl").read_text().splitlines()[0])["messages"]
    assert tokenizer.apply_chat_template(messages, return_dict=False) == document["ids"]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    stop = theirs.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in stop
    answer = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    answer = [token for token in answer[0, len(prompt) :].tolist() if token not in stop]
    assert generate(ours, [prompt], max_new_tokens=20, stop_ids=set(stop)) == [answer]


def test_what_the_run_folder_holds(base, tmp_path):
    train(base, tmp_path, train__max_steps=2)
    run = tmp_path / "run"
    assert json.loads((run / "status.json").read_text()) == {"state": "done", "exit_code": 0, "step": 2, "error": ""}
    assert {f.name for f in (run / "final").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "training.json", "README.md"}
    record = log(tmp_path)[1]
    assert set(record) == {"kind", "step", "epoch", "loss", "lr", "grad_norm", "tokens", "target_tokens", "seconds",
                           "tokens_per_second", "memory_gib"}
    assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
    assert main([str(run / "config.toml"), "--run.dir", str(tmp_path / "again")]) == 0  # the effective configuration
    again = (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in again] == [r["loss"] for r in log(tmp_path)]


def test_mfu_where_the_peak_is_known(base, tmp_path, monkeypatch):
    """An epoch's FLOPs by the log are the 6 P a token of `prepare` and what pairs of tokens cost, by hand."""
    monkeypatch.setattr(lifecycle, "peak_flops", lambda device: 1e9)
    options_of_run = options(base, tmp_path, train__max_steps=3)  # 3 steps an epoch
    assert main(options_of_run) == 0
    records = log(tmp_path)
    prepared = prepare(config_io.load(options_of_run), quiet=True)
    shape, lengths = json.loads((base / "config.json").read_text()), prepared.train.lengths.tolist()
    width, heads, shared = shape["hidden_size"], *(shape["head_dim"] * shape[f"num_{name}_heads"]
                                                   for name in ("attention", "key_value"))
    block = 2 * width * (heads + shared) + 3 * width * shape["intermediate_size"]
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    needed = shape["num_hidden_layers"] * (6 * block * sum(lengths) + 12 * heads * pairs)
    needed += 6 * shape["vocab_size"] * width * int(prepared.train.num_loss_tokens.sum())
    assert {record["epoch"] for record in records} == {0}
    assert sum(record["mfu"] * record["seconds"] * 1e9 for record in records) == pytest.approx(needed)


@pytest.mark.parametrize(("change", "message"), [
    ({"data__template": ""}, "does not say which chat template the model uses; choose with data.template: llama3"),
    ({"data__template": "llama4"}, "data.template: no template is called 'llama4'"),
    ({"data__train": "nowhere.jsonl"}, "nowhere.jsonl: No such file or directory"),
    ({"model__path": "nowhere"}, "nowhere"),
    ({"optim__lr": "fast"}, "--optim.lr"),
    ({"optim__rate": 1}, "--optim.rate"),
    ({"data__seq_len": 16}, "no conversation is left to train on"),
    ({"data__overlong": "error", "data__seq_len": 64}, "tokens, but data.seq_len is 64"),
    ({"parallel__replicate": 2}, "parallel.replicate = 2 is not the number of ranks"),
])
def test_bad_input_is_one_message_and_exit_2(base, tmp_path, capsys, change, message):
    assert main(options(base, tmp_path, **change)) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("content", "message"), [
    ('{"messages": [', "conversations.jsonl:2: "), ('[{"messages": [', "conversations.jsonl:1: "),
    ('{"words": 3}', "messages"), ("", "no conversation is left to train on"),
])
def test_broken_data_is_one_message_and_exit_2(base, tmp_path, capsys, content, message):
    good = (HERE / "oracles" / "conversations.jsonl").read_text().splitlines()[0]
    broken = tmp_path / "conversations.jsonl"
    broken.write_text(f"{good}\n{content}\n" if ":2:" in message else content)
    assert main(options(base, tmp_path, data__train=broken)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_are_refused(base, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    assert main(options(tmp_path, tmp_path)) == 2
    assert "model.layers.0.mlp.gate_proj.weight: the file has [160, 64]" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    assert main(options(tmp_path, tmp_path, model__init="random", model__path="", model__tokenizer=base,
                        model__config=tmp_path / "config.json")) == 2
    assert "is past the model's vocabulary of 300" in capsys.readouterr().err


def test_a_finished_run_is_never_overwritten(base, tmp_path, capsys):
    train(base, tmp_path, train__max_steps=1)
    before = final_weights(tmp_path)
    assert main(options(base, tmp_path, train__max_steps=1, optim__lr=1)) == 2
    assert "holds a finished run; choose another folder with run.dir" in capsys.readouterr().err
    assert all(torch.equal(weight, before[name]) for name, weight in final_weights(tmp_path).items())
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


def test_an_export_can_be_left_out(base, tmp_path):
    train(base, tmp_path, run__export="false", checkpoint__every=0, train__max_steps=2)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"
    assert not (tmp_path / "run/final").exists()
    assert not [*(tmp_path / "run/checkpoints").iterdir()]


def test_what_cannot_be_deterministic_is_refused(base, tmp_path, monkeypatch, capsys):
    """Where torch knows no deterministic kernel it raises; the run ends with 2 and the operation's name."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    def operation(*args, **kwargs):
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError("an_operation_cuda does not have a deterministic implementation, but you set "
                           "'torch.use_deterministic_algorithms(True)'.")  # as torch says it

    monkeypatch.setattr(loop, "batch_loss", operation)
    try:
        assert main(options(base, tmp_path, train__deterministic="true")) == 2
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]
    said = capsys.readouterr().err
    assert "error: train.deterministic: an_operation_cuda does not have a deterministic implementation" in said
    assert json.loads((tmp_path / "run/status.json").read_text())["exit_code"] == 2
