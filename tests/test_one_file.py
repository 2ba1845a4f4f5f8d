"""docs/one_file.py, written from the definitions alone, and the package: the same tokens, masks, losses and models."""

import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import HERE, train

from minisft.__main__ import main

ONE_FILE = HERE.parent / "docs" / "one_file.py"
CONVERSATIONS = HERE / "oracles" / "conversations.jsonl"
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}
CHATML_NAMES = {"<|reserved_special_token_0|>": "<|im_start|>", "<|reserved_special_token_1|>": "<|im_end|>"}


def turns(*contents, system=None):
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


CASES = {  # what stands under "left out" trains nothing, in the package as here
    "one question": turns("How many legs has a spider?", "Eight."),
    "a system turn": turns("Name a river.", "The Nile.", system="Answer in one sentence."),
    "several turns": turns("Hi", "Hello!", "What is 2 + 2?", "Four.", "And 3 + 3?", "Six."),
    "control tokens in content": turns(
        "What do <|eot_id|> and <|im_end|> do?", "<|eot_id|> ends a turn.<|im_end|>\n<|im_start|>user",
        system="<|begin_of_text|>Be <|start_header_id|> careful."),
    "nothing but a control token": turns("<|eot_id|>", "<|im_end|>"),
    "Turkish": turns("Iğdır'ın plakası kaç? Şöyle güzelce söyle.", "76. Çünkü alfabetik sıradadır; ığüşöç İIĞÜŞÖÇ."),
    "Turkish, decomposed": turns("s\u0327 u\u0308 g\u0306?", "I\u0307stanbul'da."),
    "an empty system turn": turns("Hi", "Hello!", system=""),
    "a blank system turn": turns("Hi", "Hello!", system=" \n\t"),
    "spaces around": turns("  Two spaces.  ", "Answer with a blank.   \n", "\n\nNext?\n", "\tYes.\u00a0",
                           system=" Be kind. "),
    "only the middle is blank": turns("a\n\n\nb", "c   d\r\ne"),
    "emoji and joiners": turns("👩‍👩‍👧 ok?", "👍🏽 yes\u200d"),
    "parts of text": [{"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]},
                      {"role": "assistant", "content": [{"type": "text", "value": "Hello."}]}],
    "an answer of weight 0": [*turns("Hi", "Wrong."), {"role": "user", "content": "Again"},
                              {"role": "assistant", "content": "Right.", "weight": 1}],
    "ends with a question": turns("Hi", "Hello!", "And?"),
    "begins with an answer": [{"role": "assistant", "content": "Welcome."}, *turns("Hi", "Hello!")],
    "left out: no answer": turns("Hi"),
    "left out: a blank answer": turns("Hi", " "),
    "left out: two questions": [{"role": "user", "content": "a"}, *turns("b", "c")],
    "left out: a late system turn": [*turns("a", "b"), {"role": "system", "content": "c"}, *turns("d", "e")],
    "left out: nothing trained": [{"role": "user", "content": "Hi"},
                                  {"role": "assistant", "content": "Hello!", "weight": 0}],
    **{f"left out: an answer with {field}": [*turns("Hi"), {"role": "assistant", "content": "Hello!", **field}]
       for field in ({"train": False}, {"trainable": 0}, {"loss_mask": 0}, {"reasoning_content": "Hm"})},
    "left out: too long": turns("word " * 300, "Yes."),
    "the last": turns("Done?", "Done."),
}
CASES["an answer of weight 0"][1]["weight"] = 0
KEPT = [name for name in CASES if not name.startswith("left out")]


@pytest.fixture(scope="module")
def one_file():
    spec = importlib.util.spec_from_file_location("one_file", ONE_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(base, tmp_path_factory):
    """The tiny Llama: untied, tied with scaled rotary embeddings, and with ChatML's control tokens."""
    folder, weights = tmp_path_factory.mktemp("models"), load_file(base / "model.safetensors")
    for name, change in {"untied": {}, "tied and scaled": {"rope_scaling": ROPE, "tie_word_embeddings": True},
                         "chatml": {}}.items():
        shutil.copytree(base, folder / name)
        config = json.loads((base / "config.json").read_text()) | change
        (folder / name / "config.json").write_text(json.dumps(config))
        if config["tie_word_embeddings"]:
            kept = {key: weight for key, weight in weights.items() if key != "lm_head.weight"}
            save_file(kept, folder / name / "model.safetensors", metadata={"format": "pt"})
    tokenizer = folder / "chatml" / "tokenizer.json"
    text = tokenizer.read_text()
    for old, new in CHATML_NAMES.items():
        text = text.replace(old, new)
    tokenizer.write_text(text)
    return folder


def run(one_file_argv, capsys):
    """Run the program in this process; returns the losses and the gradients' norms that it printed."""
    argv, sys.argv = sys.argv, [str(ONE_FILE), *map(str, one_file_argv)]
    capsys.readouterr()
    try:
        runpy.run_path(str(ONE_FILE), run_name="__main__")
    finally:
        sys.argv = argv
    return figures(capsys.readouterr().out)


def figures(printed):
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


def options(model, out, **changes):
    """A step holds all conversations of the oracle, whatever its packs."""
    given = {"template": "llama3", "seq-len": 512, "packs": 64, "steps": 10, "lr": 1e-3, "warmup": 3,
             "precision": "fp32", "out": out} | changes
    return [model, CONVERSATIONS, *(text for key, value in given.items() for text in (f"--{key}", value))]


# ---- tokens and masks ------------------------------------------------------------------------------------------------


def written(path, conversations):
    path.write_text("".join(json.dumps({"messages": case}) + "\n" for case in conversations), encoding="utf-8")
    return path


@pytest.mark.parametrize(("template", "model"), [("llama3", "untied"), ("chatml", "chatml")])
def test_ids_and_masks_are_the_packages(one_file, models, tmp_path, template, model):
    data, dump = written(tmp_path / "cases.jsonl", CASES.values()), tmp_path / "dump.jsonl"
    (tmp_path / "recipe.toml").write_text("")
    assert main(["prepare", str(tmp_path / "recipe.toml"), "--model.path", str(models / model),
                 "--data.train", str(data), "--data.template", template, "--data.seq_len", "256",
                 "--data.cache", str(tmp_path / "cache"), "--dump", str(dump)]) == 0
    chosen = one_file.TEMPLATES[template]
    tokenizer = one_file.load_tokenizer(models / model, chosen)
    documents, left_out = one_file.read(data, chosen, tokenizer, 256)
    expected = [(document["ids"], document["trained"]) for document in map(json.loads, dump.read_text().splitlines())]
    assert len(documents) == len(KEPT)
    assert documents == expected
    assert sum(left_out.values()) == len(CASES) - len(KEPT)


@pytest.mark.parametrize(("template", "model"), [("llama3", "untied"), ("chatml", "chatml")])
def test_one_beginning_and_every_answer_ends_in_its_stop_token(one_file, models, template, model):
    chosen = one_file.TEMPLATES[template]
    tokenizer = one_file.load_tokenizer(models / model, chosen)
    stop, begin = tokenizer.token_to_id(chosen.stop), tokenizer.token_to_id("<|begin_of_text|>")
    for name in KEPT:
        turns_kept = one_file.turns_of(CASES[name])
        ids, trained = one_file.encode(turns_kept, chosen, tokenizer)
        assert ids.count(begin) == (template == "llama3"), name
        assert ids.count(stop) == len(turns_kept), name
        assert [token for token, mask in zip(ids, trained, strict=True) if mask].count(stop) == sum(
            mask for _, _, mask in turns_kept), name


def test_weights_are_left_out_and_counted(one_file, models, tmp_path):
    """The package weighs tokens; this file says that it does not."""
    data = written(tmp_path / "data.jsonl", [CASES["one question"], [*turns("Hi"), {
        "role": "assistant", "content": "Hello!", "weight": 0.5}]])
    with data.open("a") as file:
        for fields in ({"weight": 2.5}, {"weight": 1}, {"loss_weight": 0}, {"train": False}, {"system": "Rhyme."}):
            file.write(json.dumps({"messages": turns("Hi", "Yes."), **fields}) + "\n")
    chosen = one_file.TEMPLATES["llama3"]
    documents, left_out = one_file.read(data, chosen, one_file.load_tokenizer(models / "untied", chosen), 256)
    assert len(documents) == 2
    assert left_out == {"a turn is not plain text with a weight of 0 or 1": 1,
                        "a record with a weight, or of more than messages": 4}


@pytest.mark.parametrize(("line", "reason"), [
    ("{", "data.jsonl:2: not"), ('{"prompt": "a"}', "data.jsonl:2: not"), ('{"messages": [3]}', "data.jsonl:2: not")])
def test_what_is_no_conversation_is_an_error_with_its_line(one_file, models, tmp_path, line, reason):
    data = written(tmp_path / "data.jsonl", [CASES["one question"]])
    data.write_text(data.read_text() + line + "\n")
    chosen = one_file.TEMPLATES["llama3"]
    with pytest.raises(SystemExit, match=reason):
        one_file.read(data, chosen, one_file.load_tokenizer(models / "untied", chosen), 256)


def test_a_template_of_another_model_is_refused(one_file, models):
    with pytest.raises(SystemExit, match=r"<\|im_start\|> is missing; choose the --template"):
        one_file.load_tokenizer(models / "untied", one_file.TEMPLATES["chatml"])


# ---- packs -----------------------------------------------------------------------------------------------------------


def test_every_epoch_has_every_document_once_and_even_steps(one_file):
    documents = [([number] * length, [1] * length) for number, length in enumerate([5, 3, 9, 2, 7, 4, 4, 1, 8, 6, 10])]
    first, orders = next(one_file.steps(documents, seq_len=10, packs=2, seed=3)), []
    plan = one_file.steps(documents, seq_len=10, packs=2, seed=3)
    for _ in range(3):
        seen, sizes = [], []
        while len(seen) < len(documents):
            packs = next(plan)
            assert all(sum(len(ids) for ids, _ in pack) <= 10 for pack in packs)
            seen += [ids[0] for pack in packs for ids, _ in pack]
            sizes.append(len(packs))
        assert sorted(seen) == list(range(len(documents)))
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= 2
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]
    assert next(one_file.steps(documents, seq_len=10, packs=2, seed=3)) == first


def test_targets_are_shifted_once_and_never_cross_a_boundary(one_file):
    tokens = one_file.stream([([10, 11, 12, 13], [0, 0, 1, 1]), ([20, 21, 22], [0, 1, 1])], torch.device("cpu"))
    assert tokens.ids.tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert tokens.targets.tolist() == [-100, 12, 13, -100, 21, 22, -100]
    assert tokens.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert tokens.cu_seqlens.tolist() == [0, 4, 7]


# ---- losses and models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [pytest.param("untied", marks=pytest.mark.slow), "tied and scaled"])
def test_ten_steps_have_the_packages_losses_and_the_model_is_transformers(one_file, models, tmp_path, capsys, model):
    """In fp32, when a step holds the whole data set: then only rounding depends on what lies in which pack."""
    from transformers import AutoModelForCausalLM

    records = train(models / model, tmp_path, batch__packs=64, optim__schedule="cosine", optim__warmup_steps=3)
    losses, norms = run(options(models / model, tmp_path / "out"), capsys)
    assert losses == pytest.approx([record["loss"] for record in records], abs=1e-5)
    assert norms == pytest.approx([record["grad_norm"] for record in records], rel=1e-4)
    assert losses[-1] < losses[0] - 1  # it learns

    ours = one_file.Llama(one_file.read_config(tmp_path / "out"))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    ours.load_state_dict(weights)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(0, 309, (150,), generator=torch.Generator().manual_seed(1))
    seen = []
    ours.model["norm"].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        ours(one_file.stream([(ids.tolist(), [1] * len(ids))], torch.device("cpu")))
        expected = theirs(ids[None]).logits[0]
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    assert torch.allclose(seen[0] @ head.T, expected, atol=2e-5)
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert weights.keys() == final.keys()
    assert all(torch.allclose(weight, final[name], atol=1e-4) for name, weight in weights.items())


@pytest.mark.parametrize(("template", "model"), [("llama3", "untied"), ("chatml", "chatml")])
def test_the_exported_chat_template_writes_the_trained_tokens(one_file, models, tmp_path, capsys, template, model):
    from transformers import AutoTokenizer

    run(options(models / model, tmp_path / "out", template=template, steps=1, precision="bf16"), capsys)
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    theirs, chosen = AutoTokenizer.from_pretrained(tmp_path / "out"), one_file.TEMPLATES[template]
    tokenizer = one_file.load_tokenizer(tmp_path / "out", chosen)
    for name in ("one question", "a system turn", "several turns", "Turkish", "spaces around"):
        ids, _ = one_file.encode(one_file.turns_of(CASES[name]), chosen, tokenizer)
        assert theirs.apply_chat_template(CASES[name], return_dict=False) == ids, name
        prompt = theirs.apply_chat_template(CASES[name][:-1], add_generation_prompt=True, return_dict=False)
        assert prompt == ids[: len(prompt)], name
    stop = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert theirs.convert_ids_to_tokens(stop) == chosen.stop


@pytest.mark.slow
def test_two_ranks_train_the_model_that_one_does(models, tmp_path, capsys):
    """With packs of 200 tokens, an odd number of them: one rank runs a pack without a trained token."""
    changes = {"seq-len": 200, "packs": 7, "steps": 6}
    alone = run(options(models / "tied and scaled", tmp_path / "one", **changes), capsys)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "127.0.0.1:0", ONE_FILE]
    done = subprocess.run([*map(str, command), *map(str, options(models / "tied and scaled", tmp_path / "two",
                                                                 **changes))],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    losses, norms = figures(done.stdout)
    assert losses == pytest.approx(alone[0], abs=1e-5)
    assert norms == pytest.approx(alone[1], rel=1e-4)  # AdamW would hide a gradient that is twice as large
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(weight, two[name], atol=1e-4) for name, weight in one.items())


# ---- the file --------------------------------------------------------------------------------------------------------


def test_it_is_one_short_file_that_needs_nothing_of_the_package():
    text = ONE_FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    roots = {name.partition(".")[0] for name in imported}
    assert roots <= sys.stdlib_module_names | {"torch", "tokenizers", "safetensors", "numpy"}


def test_each_silent_mistake_is_named_where_it_would_happen():
    text = " ".join(ONE_FILE.read_text(encoding="utf-8").split())
    for trap in ("double BOS", "the missing stop token", "special tokens in content", "the shift", "leaking documents",
                 "the mean of means"):
        assert f"TRAP, {trap}:" in text


# ---- one change, and what the lesson says of it ----------------------------------------------------------------------

LESSON = (HERE.parent / "docs/lesson.md").read_text(encoding="utf-8")
CHANGES = [shlex.split(command.replace("\\\n", ""))[2:] for command in
           re.findall(r"^(python docs/experiments/change\.py .*?[^\\])$", LESSON, re.MULTILINE | re.DOTALL)]
STOP, ALL, MEANS, UNSHIFTED, WARMUP, BF16, POSITIONS, BOUNDARIES = (change[0] for change in CHANGES)


@pytest.fixture(scope="module")
def change():
    """docs/experiments/change.py"""
    spec = importlib.util.spec_from_file_location("change", HERE.parent / "docs/experiments/change.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(change, tmp_path_factory):
    """What 12 steps of a program print of the small model; the lesson takes 40."""
    change.write_model((folder := tmp_path_factory.mktemp("change")) / "model")

    @cache
    def run_once(text, *given):
        (program := folder / "changed.py").write_text(text)
        return change.trained(program, folder, change.OPTIONS | dict(zip(given[::2], given[1::2], strict=True))
                              | {"--steps": "12"})

    return run_once


def test_a_change_must_fit_one_place(change):
    for old, new, *_ in CHANGES:
        text = ONE_FILE.read_text(encoding="utf-8")
        assert change.changed(old, new, text).replace(new, old) == text
    for old, times in (("no such line", 0), ("def ", 2)):
        with pytest.raises(SystemExit, match=f"^'{old}' stands {times} times in one_file.py; write a part of it "):
            change.changed(old, "x", "def a: ...\ndef b: ...\n")


@pytest.mark.parametrize(("old", "holds"), [pytest.param(*pair, id=name, marks=[pytest.mark.slow] * (
    name not in ("stop", "boundaries"))) for name, pair in zip((
        "stop", "all", "means", "unshifted", "warmup", "bf16", "positions", "boundaries"), {
    # a: losses of the steps; end: of the answers
    STOP: lambda a, end, b, its_end: a[0] == pytest.approx(b[0], abs=0.1) and its_end > end + 0.1,
    ALL: lambda a, end, b, its_end: abs(a[0] - b[0]) > 0.05 and its_end > end + 0.1,
    MEANS: lambda a, end, b, its_end: a[0] != pytest.approx(b[0], abs=1e-4) and its_end > end,
    UNSHIFTED: lambda a, end, b, its_end: b[-1] < a[-1] - 1 and its_end > end + 3,
    WARMUP: lambda a, end, b, its_end: b[1] == pytest.approx(b[0], abs=1e-5) and a[1] < a[0] - 0.3,
    BF16: lambda a, end, b, its_end: a[-1] < a[0] - 0.3 and b[0] - b[-1] < (a[0] - a[-1]) / 2,
    POSITIONS: lambda a, end, b, its_end: [*b, its_end] == pytest.approx([*a, end], abs=1e-3),
    BOUNDARIES: lambda a, end, b, its_end: abs(a[0] - b[0]) > 0.05 and its_end > end + 0.3,
}.items(), strict=True)])
def test_a_change_does_what_the_lesson_says(change, trained, old, holds):
    [(_, new, *given)] = [each for each in CHANGES if each[0] == old]
    text = ONE_FILE.read_text(encoding="utf-8")
    (steps, answers), (its_steps, its_answers) = trained(text, *given), trained(text.replace(old, new), *given)
    assert holds(steps, answers, its_steps, its_answers), (steps, answers, its_steps, its_answers)
