"""The exported folder in the hands of the programs that serve it: transformers, vLLM, llama.cpp.

vLLM is not installed here: what it reads is checked file by file. llama.cpp is tested where llama-cpp-python is
installed and MINISFT_LLAMA_CPP names a folder with llama.cpp's convert_hf_to_gguf.py (the source distribution of
llama-cpp-python has one, in vendor/llama.cpp).
"""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_runs import train

from minisft.data.chat import Renderer
from minisft.data.conversation import Turn
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.export import hf_folder
from minisft.generate.assistant import Assistant
from minisft.model import weights
from minisft.model.llama_config import read_config
from minisft.runs import lifecycle

LLAMA_CPP = os.environ.get("MINISFT_LLAMA_CPP", "")
SMOLLM2, DATA = os.environ.get("MINISFT_SMOLLM2", ""), os.environ.get("MINISFT_DATA", "")
TEXT = "Merhaba! Üç günde İzmir'den Ağrı'ya: 1.234 km.\n\n  def f(x):\treturn x² — “ok” 🚂 <|eot_id|>"


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["whole", "in shards"])
def final(request, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in shards":
            patch.setattr(hf_folder.weights, "save", partial(weights.save, shard_bytes=100_000))
        train(base, folder, train__max_steps=1, batch__packs=1, train__precision="bf16")
    return folder / "run" / "final"


def test_what_vllm_reads(final):
    """A model class that it has, weights in safetensors (all of them by the index, where there is one) of the type that
    config.json says, tokens to stop at, a chat template, and no code of the folder's own."""
    transformers = pytest.importorskip("transformers")
    config = read(final, "config.json")
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert "auto_map" not in config
    with torch.device("meta"):
        expected = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(final)).state_dict()
    files = sorted(final.glob("*.safetensors"))
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            found |= {name: (file.name, tensors.get_slice(name)) for name in tensors.keys()}  # noqa: SIM118
    assert {name: list(t.get_shape()) for name, (_, t) in found.items()} == {
        name: list(tensor.shape) for name, tensor in expected.items()}
    assert {t.get_dtype() for _, t in found.values()} == {"BF16"}
    assert config["torch_dtype"] == "bfloat16"
    if len(files) > 1:
        index = read(final, "model.safetensors.index.json")
        assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
        assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in expected.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    ends = read(final, "generation_config.json")["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"]) == sorted(ends)
    assert tokenizer.chat_template == read(final, "tokenizer_config.json")["chat_template"]
    assert "auto_map" not in read(final, "tokenizer_config.json")


def test_transformers_answers_the_same(final):
    """By the Auto classes and the card's own way: the template, then generate."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    model = transformers.AutoModelForCausalLM.from_pretrained(final, dtype="auto")
    assert model.dtype == torch.bfloat16
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True)
    answer = model.float().generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    said = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert Assistant.load(final).answer([(Turn("user", "Hello!"),)], max_new_tokens=12) == [said]


def other_base(base, folder, *, config=None, settings=None, training=None):
    """A copy of the base whose files have more in them; surrogates as JSON has them."""
    copy = Path(shutil.copytree(base, folder / "base"))
    for name, more in (("config.json", config), ("tokenizer_config.json", settings), ("training.json", training)):
        if more is not None:
            before = read(copy, name) if (copy / name).exists() else {}
            (copy / name).write_text(json.dumps(before | more))
    return copy


CODE = {"auto_map": {"AutoTokenizer": ["evil--tok.Evil", None]}, "custom_pipelines": {"x": {"impl": "evil.Evil"}},
        "tokenizer_class": "TokenizersBackend", "backend": "custom", "tokenizer_file": "/etc/passwd",
        "processor_class": "Evil", "split_special_tokens": True, "add_prefix_space": True}


@pytest.mark.parametrize("kind", ["TokenizersBackend", "EvilTokenizer", "LlamaTokenizer", "GPT2Tokenizer", 3, None])
def test_only_tokens_and_sizes_of_a_foreign_base_are_copied(base, tmp_path, kind):
    """No name of code, no class that transformers 4 lacks or that changes the pieces: ids as they were trained."""
    transformers = pytest.importorskip("transformers")
    settings = {**CODE, "tokenizer_class": kind, "extra_special_tokens": {"image_token": "<|python_tag|>"}}
    other = other_base(base, tmp_path, settings=settings, config={"auto_map": CODE["auto_map"]})
    train(other, tmp_path, train__max_steps=1, batch__packs=1)
    final = tmp_path / "run" / "final"
    found = read(final, "tokenizer_config.json")
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found.keys() - {"chat_template", "extra_special_tokens"} <= read(base, "tokenizer_config.json").keys()
    assert not read(final, "config.json").keys() & {"auto_map", "custom_pipelines"}
    theirs = transformers.AutoTokenizer.from_pretrained(final, trust_remote_code=False)
    assert theirs.image_token == "<|python_tag|>"
    assert (theirs.eos_token, theirs.pad_token) == ("<|eot_id|>", "<|finetune_right_pad_id|>")
    ours = Assistant.load(final).renderer
    prompt = theirs.apply_chat_template([{"role": "user", "content": " Hello "}], add_generation_prompt=True,
                                        return_dict=False)
    assert prompt == ours.prompt((Turn("user", " Hello "),))
    plain = TEXT.replace("<|eot_id|>", "")
    assert theirs.encode(plain, add_special_tokens=False) == ours.tokenizer.encode(plain)


def test_half_of_a_surrogate_pair_in_the_base_s_files_is_carried_over(base, tmp_path):
    half = {"a": "\ud800 \\ud800 \\\udc00 \\"}
    other = other_base(base, tmp_path, config=half, training=half,
                       settings={"extra_special_tokens": half, "model_input_names": ["\udfff"]})
    train(other, tmp_path, train__max_steps=1, batch__packs=1)
    final = tmp_path / "run" / "final"
    assert read(final, "training.json")["base"]["training"] == half
    assert read(final, "training.json")["base"]["config"]["a"] == half["a"]
    found = read(final, "tokenizer_config.json")
    assert (found["extra_special_tokens"], found["model_input_names"]) == (half, ["\udfff"])


def test_the_exported_tokenizer_is_the_one_trained_with(base, tmp_path, monkeypatch):
    """Changes to the base's folder during the run do not matter."""
    other, steps = other_base(base, tmp_path), lifecycle.run_steps

    def meanwhile(*given, **named):
        content = read(other, "tokenizer.json")
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (other / "tokenizer.json").write_text(json.dumps(content))
        (other / "tokenizer_config.json").unlink()
        return steps(*given, **named)

    monkeypatch.setattr(lifecycle, "run_steps", meanwhile)
    train(other, tmp_path, train__max_steps=1, batch__packs=1)
    final = tmp_path / "run" / "final"
    assert (final / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def tried(base, final, **record):
    tokenizer = Tokenizer(base)
    hf_folder.try_export(read_config(base), Renderer(load_templates()["llama3"], tokenizer), final, record={
        "base": None, "minisft": "0", "commit": "", "torch": "2", "ranks": 1, "steps": 0, "total_steps": 1, "tokens": 0,
        "target_tokens": 0, "seconds": 0, "data": {}, "losses": {}, "recipe": "", **record})


def test_a_model_that_cannot_be_written_is_refused_before_training(base, tmp_path):
    final = tmp_path / "run" / "final"
    tried(base, final)
    assert not (tmp_path / "run").exists()
    deep = []
    for _ in range(2000):
        deep = [deep]
    for message, bad in (("RecursionError", {"more": deep}), ("TypeError", {"more": {1, 2}}),
                         ("KeyError: 'file'", {"data": {"train": [{}]}})):
        with pytest.raises(UserError, match=rf"final: could not be written at the end \({message}.*; repair or remove"):
            tried(base, final, **bad)
    for place in (final, final.with_name("final.tmp")):
        place.parent.mkdir(exist_ok=True)
        for make in (place.touch, lambda place=place: place.symlink_to(base)):
            make()
            with pytest.raises(UserError, match=rf"{place.name}: is where the trained model will be written"):
                tried(base, final)
            place.unlink()
    (base_settings := tmp_path / "x").mkdir()
    shutil.copyfile(base / "tokenizer.json", base_settings / "tokenizer.json")
    shutil.copyfile(base / "config.json", base_settings / "config.json")
    (base_settings / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not readable JSON"):
        tried(base_settings, final)


def converted(folder):
    """llama.cpp's own converter on an exported folder, in fp32."""
    file = folder.parent / "model.gguf"
    command = [sys.executable, f"{LLAMA_CPP}/convert_hf_to_gguf.py", str(folder), "--outfile", str(file), "--outtype",
               "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return file


needs_llama_cpp = pytest.mark.skipif(not LLAMA_CPP, reason="MINISFT_LLAMA_CPP names llama.cpp's folder")


@needs_llama_cpp
@pytest.mark.skipif(not SMOLLM2, reason="MINISFT_SMOLLM2 names the model's folder")
def test_llama_cpp_answers_the_same(tmp_path):
    """It gets the same prompt tokens from the template in the file, and generates the same greedy text."""
    llama_cpp = pytest.importorskip("llama_cpp")
    train(SMOLLM2, tmp_path, train__max_steps=2, batch__packs=1, data__template="chatml", optim__lr=1e-4)
    final = tmp_path / "run" / "final"
    theirs = llama_cpp.Llama(str(converted(final)), n_ctx=256, n_threads=1, verbose=False)
    ours = Assistant.load(final)
    turns = [(Turn("user", question),) for question in ("What is the capital of France?", "Türkiye'nin başkenti?")]
    for turn, answer in zip(turns, ours.answer(turns, max_new_tokens=24), strict=True):
        prompt = ours.renderer.prompt(turn)
        said = theirs.create_completion(prompt, temperature=0, max_tokens=24)["choices"][0]["text"]
        assert said == answer
        messages = [{"role": "user", "content": turn[0].content}]
        chatted = theirs.create_chat_completion(messages, temperature=0, max_tokens=24)
        assert chatted["choices"][0]["message"]["content"] == answer
        assert chatted["usage"]["prompt_tokens"] == len(prompt)
    plain = TEXT.replace("<|eot_id|>", "")
    assert theirs.tokenize(plain.encode(), add_bos=False, special=False) == ours.renderer.tokenizer.encode(plain)


@needs_llama_cpp
@pytest.mark.skipif(not DATA, reason="MINISFT_DATA names the folder of data files")
def test_llama_cpp_knows_llama_3_s_tokens(base, tmp_path):
    """Llama-3's tokenizer goes through the converter: the same tokens, none special from text, the same stop."""
    llama_cpp = pytest.importorskip("llama_cpp")
    shape = {**read(base, "config.json"), "vocab_size": 128_256, "bos_token_id": 128_000, "eos_token_id": 128_009}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    train("", tmp_path, model__init="random", model__config=tmp_path / "config.json",
          model__tokenizer=Path(DATA) / "llama3_tokenizer", train__max_steps=1, batch__packs=1)
    final = tmp_path / "run" / "final"
    theirs = llama_cpp.Llama(str(converted(final)), n_ctx=256, n_threads=1, verbose=False)
    ours = Assistant.load(final)
    assert theirs.tokenize(TEXT.encode(), add_bos=False, special=False) == ours.renderer.tokenizer.encode(TEXT)
    prompt = ours.renderer.prompt((Turn("user", "Hello!"),))
    answer, = ours.answer([(Turn("user", "Hello!"),)], max_new_tokens=8)
    assert theirs.create_completion(prompt, temperature=0, max_tokens=8)["choices"][0]["text"] == answer
    assert theirs.token_eos() == 128_009


def test_a_folder_of_something_else_is_not_deleted(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final/mine").touch()
    with pytest.raises(OSError, match="final: holds something other than a model; move it elsewhere"), \
            hf_folder.atomic_dir(tmp_path / "final", is_main=True):
        pytest.fail("it would be replaced")
    assert (tmp_path / "final/mine").exists()
