"""`minisft convert`: every conversion, checked against transformers, and everything that it refuses."""

import json
import shutil

import pytest
import torch
from oracles.tiny_llama import tiny_weights
from safetensors.torch import load_file, save_file
from test_meta import PARAMS, TOKENS, random_state, write

from minisft.__main__ import main
from minisft.pretrained import from_pretrained

NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter of one matrix, written by hand in PEFT's format."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 160), (64, 2)))
    save_file({f"base_model.model.{NAME}.lora_{k}.weight": v for k, v in (("A", a), ("B", b))},
              folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, 1.5 * b @ a


def test_an_adapter_is_merged_into_its_base(base, tmp_path, adapter, capsys):
    folder, delta = adapter
    assert main(["convert", str(folder), str(tmp_path / "merged"), "--merge", "--dtype", "fp32"]) == 0
    assert "127,296 parameters in fp32" in capsys.readouterr().out
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    before[f"{NAME}.weight"] += delta
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight)
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_the_tokenizer_of_a_merged_model_is_the_adapters_or_the_bases_never_both(base, tmp_path, adapter):
    """transformers saves the template as chat_template.jinja, which comes before the one in tokenizer_config.json."""
    folder, named = adapter[0], shutil.copytree(base, tmp_path / "named")
    for name in ("chat_template.jinja", "special_tokens_map.json", "generation_config.json"):
        (named / name).write_text(json.dumps("the base's"))
    for out, theirs in (("before", named), ("after", folder)):
        assert main(["convert", str(folder), str(tmp_path / out), "--merge", "--base", str(named)]) == 0
        merged = {file.name: file.read_bytes() for file in (tmp_path / out).glob("[!m]*") if file.name != "config.json"}
        assert merged == {name: (theirs / name).read_bytes() for name in merged}  # of one folder
        assert ("chat_template.jinja" in merged) == (theirs == named)
        shutil.copyfile(base / "tokenizer.json", folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text('{"chat_template": "the adapter\'s"}')
        (folder / "generation_config.json").write_text('{"eos_token_id": 318}')


def test_a_stray_config_beside_an_adapter_changes_nothing(base, tmp_path, adapter):
    folder, _ = adapter
    expected = from_pretrained(folder).logits(TOKENS)
    (folder / "config.json").write_text("{}")
    assert torch.equal(from_pretrained(folder).logits(TOKENS), expected)
    assert main(["convert", str(folder), str(tmp_path / "merged"), "--merge", "--dtype", "fp32"]) == 0
    assert torch.equal(from_pretrained(tmp_path / "merged").logits(TOKENS), expected)


@pytest.mark.parametrize("target", [".", "/", "missing/there/out"])
def test_targets_at_odd_places(base, tmp_path, monkeypatch, capsys, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code = main(["convert", str(base), target])
    printed = capsys.readouterr().err
    if target in ("/", "."):
        assert code == 2
        why = "/here: is a link, the current folder, or a folder around it" if target == "." else "/: exists and"
        assert why in printed
    else:
        assert (code, printed) == (0, "")
        assert (tmp_path / "here" / target / "model.safetensors").exists()


def test_a_merged_matrix_that_overflows_is_refused(base, tmp_path, adapter, capsys):
    folder, _ = adapter
    tensors = {name: tensor * 1e25 for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    assert main(["convert", str(folder), str(tmp_path / "merged"), "--merge"]) == 3
    assert f"{folder}: with its adapter {NAME} has numbers that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_the_base_may_be_elsewhere(base, tmp_path, adapter, capsys):
    folder, _ = adapter
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "some/model"}))
    assert main(["convert", str(folder), str(tmp_path / "merged"), "--merge"]) == 2
    assert f"convert {folder} TARGET --merge --base FOLDER` makes one" in capsys.readouterr().err
    assert main(["chat", str(folder), "--prompt", "Hello"]) == 2
    assert "its base model 'some/model' is not a folder here" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert main(["convert", str(folder), str(tmp_path / "merged"), "--merge", "--base", str(base)]) == 0


def test_another_precision_is_a_rounding(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert main(["convert", str(base), str(tmp_path / "narrow")]) == 0
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "narrow")
    assert theirs.dtype == torch.bfloat16
    for name, weight in tiny_weights().items():
        assert torch.equal(theirs.get_parameter(name), torch.from_numpy(weight).bfloat16())


def test_the_record_of_the_rounds_goes_along(base, tmp_path, adapter):
    """A model's own; an adapter's base has another history."""
    trained = shutil.copytree(base, tmp_path / "trained")
    (trained / "training.json").write_text('{"steps": 1}')
    assert main(["convert", str(trained), str(tmp_path / "narrow")]) == 0
    assert (tmp_path / "narrow" / "training.json").read_text() == '{"steps": 1}'
    assert main(["convert", str(adapter[0]), str(tmp_path / "merged"), "--merge", "--base", str(trained)]) == 0
    assert not (tmp_path / "merged" / "training.json").exists()


def test_metas_files_become_hugging_faces(tmp_path):
    (source := tmp_path / "meta").mkdir()
    write(source, PARAMS, random_state(PARAMS), 2)
    assert main(["convert", str(source), str(tmp_path / "hf"), "--format", "meta", "--dtype", "fp32"]) == 0
    assert torch.equal(from_pretrained(tmp_path / "hf").logits(TOKENS),
                       from_pretrained(source, format="meta").logits(TOKENS))


@pytest.mark.parametrize(("source", "options", "message"), [
    ("base", ["--merge"], "holds no adapter (it has no adapter_config.json); leave out --merge"),
    ("both", ["--merge"], "holds a model beside its adapter (model.safetensors); leave out --merge, or move one"),
    ("stray", [], "holds an adapter; add --merge"),
    ("adapter", [], "holds an adapter; add --merge"), ("base", ["--base", "x"], "so it needs --merge"),
    ("base", ["--optim.lr", "1"], "unknown argument --optim.lr"), ("nowhere", [], "nowhere: no such folder"),
])
def test_what_cannot_be_is_one_line_and_exit_2(base, tmp_path, adapter, capsys, source, options, message):
    if source in ("both", "stray"):
        shutil.copyfile(base / "config.json", adapter[0] / "config.json")
    if source == "both":
        shutil.copyfile(base / "model.safetensors", adapter[0] / "model.safetensors")
    source = {"base": base, "nowhere": tmp_path / "nowhere"}.get(source, adapter[0])
    assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["a file", "a folder with something in it"])
def test_nothing_foreign_is_overwritten(base, tmp_path, capsys, kind):
    target = tmp_path / "mine"
    file = target if kind == "a file" else target / "notes.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    assert main(["convert", str(base), str(target)]) == 2
    assert f"{target}: exists and is not an empty folder" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert main(["convert", str(base), str(base)]) == 2


@pytest.mark.parametrize("target", [".", "", "a/..", "link"])
def test_a_target_that_is_here_or_a_link_is_refused(base, tmp_path, monkeypatch, capsys, target):
    monkeypatch.chdir(tmp_path)
    if target == "link":
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert main(["convert", str(base), target]) == 2
    assert "is a link, the current folder, or a folder around it; name a new folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir() if file.name != "link"] == []


def test_a_conversion_that_fails_leaves_nothing(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("shutil.copyfile", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    assert main(["convert", str(base), str(tmp_path / "out")]) == 4
    assert "no space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
