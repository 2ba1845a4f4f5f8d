"""A config.json is read as transformers reads it, or refused by field and value; nothing that it can contain crashes.

Oracles: `transformers` for what a file leaves out, the published parameter counts for the presets.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisft.errors import UserError
from minisft.model.llama import Llama
from minisft.model.llama_config import PRESETS, LlamaConfig, read_config

RAW = {"model_type": "llama", "vocab_size": 37, "hidden_size": 16, "intermediate_size": 22, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6)


def refusal(action: Any, *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        action(*args)
    return str(caught.value)


def read(tmp_path: Path, raw: Any) -> LlamaConfig:
    (tmp_path / "config.json").write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    return read_config(tmp_path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "mistral"}, "model_type is 'mistral'; minisft trains Llama-3 networks, where it is 'llama'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"pretraining_tp": 2}, "pretraining_tp is 2"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"hidden_size": "16"}, "hidden_size is '16'; a whole number from 1 to 1048576 is needed"),
    ({"hidden_size": 16.0}, "hidden_size is 16.0"), ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_attention_heads": [4]}, "num_attention_heads is [4]"), ({"vocab_size": True}, "vocab_size is True"),
    ({"vocab_size": None}, "vocab_size is None"), ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"intermediate_size": 10**30}, f"intermediate_size is {10**30}"), ({"head_dim": 0}, "head_dim is 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"num_key_value_heads": False}, "num_key_value_heads is False"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"head_dim": 5}, "head_dim is 5; rotary embeddings need an even number"),
    ({"rope_theta": "500000"}, "rope_theta is '500000'; a positive number is needed"),
    ({"rope_theta": 0}, "rope_theta is 0"), ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ({"rope_theta": 8e-60}, "rope_theta is 8e-60; a positive number is needed, one whose powers fp32 can hold"),
    ({"num_hidden_layers": 10**5}, "num_hidden_layers is 100000; a whole number from 1 to 1024 is needed"),
    ({"vocab_size": "\x1b[2J" + "9" * 10**6}, "vocab_size is '\\x1b[2J9999"),
    ({"rope_theta": 10**400}, "rope_theta is 1000"), ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"), ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; true or false is needed"),
    ({"attention_bias": 1}, "attention_bias is 1"), ({"mlp_bias": []}, "mlp_bias is []"),
    ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'; a token id is needed"),
    ({"eos_token_id": [2, -1]}, "eos_token_id is [2, -1]"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type 'linear' is not supported"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not supported; Llama-3 uses 'default' or 'llama3'"),
    ({"rope_scaling": [8]}, "rope_scaling or rope_parameters is [8]; an object is needed"),
    ({"rope_parameters": "llama3"}, "is 'llama3'; an object is needed"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta is None"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
    ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor is '8'"),
    ({"rope_scaling": {**LLAMA3, "factor": -8}}, "factor is -8"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor 4.0 is not below high_freq_factor 4.0"),
])
def test_a_field_that_cannot_be_is_named_with_its_value(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    text = refusal(read, tmp_path, {**RAW, **changes})
    assert text.startswith(f"{tmp_path / 'config.json'}: ")
    assert message in text
    assert len(text) < len(str(tmp_path)) + 250


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                   "num_attention_heads"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    assert f"{field} is missing" in refusal(read, tmp_path, {name: RAW[name] for name in RAW if name != field})


@pytest.mark.parametrize(("content", "message"), [
    ([RAW], "expected a JSON object, found list"), (b"\xff\xfe\x00garbage", "not a readable JSON file"),
    (b'{"vocab_size": 3', "not a readable JSON file"), (b"", "not a readable JSON file"), (b"null", "found NoneType"),
    (b"[" * 100_000, "not a readable JSON file"), (b"9" * 5000, "not a readable JSON file")], ids=range(7))
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    assert message in refusal(read, tmp_path, content)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    assert "config.json: no such file; a Hugging Face model folder has a config.json" in refusal(read_config, tmp_path)
    (tmp_path / "adapter_config.json").touch()
    assert f"`minisft convert {tmp_path} TARGET --merge` makes one model of it" in refusal(read_config, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.json").mkdir()
    assert "not a readable JSON file" in refusal(read_config, tmp_path)


def test_what_a_config_omits_has_the_value_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    raw = {name: RAW[name] for name in RAW if name not in ("rms_norm_eps", "rope_theta", "num_key_value_heads")}
    ours, theirs = read(tmp_path, raw), transformers.LlamaConfig(**raw)
    for name in ("rms_norm_eps", "num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias",
                 "max_position_embeddings", "initializer_range"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling is None


FIELDS = [*RAW, "head_dim", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias", "hidden_act",
          "max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pretraining_tp"]
ROPE = st.dictionaries(st.sampled_from([*LLAMA3, "type", "rope_theta"]), ANY_JSON | st.just("llama3"), max_size=3)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5),
                               ANY_JSON | st.integers(1, 8) | ROPE | ROPE.map(lambda rope: LLAMA3 | rope), max_size=3))
def test_any_config_is_a_network_or_a_user_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    try:
        config = read(tmp_path, RAW | changes)
    except UserError as error:
        assert str(tmp_path) in str(error)  # noqa: PT017 (either outcome is lawful)
    else:
        with torch.device("meta"):
            Llama(dataclasses.replace(config, num_hidden_layers=1))
        assert read(tmp_path, config.to_dict(dtype="float32")) == config


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_their_own_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[name].to_dict(dtype="bfloat16")))
    assert read_config(tmp_path) == PRESETS[name]


@pytest.mark.parametrize(("name", "billions"), [
    ("llama-3-8b", 8.03), ("llama-3.1-70b", 70.55), ("llama-3.2-1b", 1.236), ("llama-3.2-3b", 3.213),
    ("llama-3.1-405b", 405.85)])
def test_presets_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = Llama(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
