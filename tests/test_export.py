"""The exported folder in the hands of the programs that serve it: transformers, vLLM, llama.cpp.

vLLM is not installed here: what it reads is checked file by file. llama.cpp is tested where llama-cpp-python is
installed and MINISFT_LLAMA_CPP names a folder with llama.cpp's convert_hf_to_gguf.py (the source distribution of
llama-cpp-python has one, in vendor/llama.cpp).
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_runs import train

from minisft.data.conversation import Turn
from minisft.evaluation.assistant import Assistant
from minisft.model import weights
from minisft.training import export

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
            patch.setattr(export.weights, "save", partial(weights.save, shard_bytes=100_000))
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
    """The same prompt tokens by the template in the file, and the same greedy text."""
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
