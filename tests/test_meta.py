"""Meta's checkpoints give the network that Meta's own code would run.

Three oracles. `meta_logits` is Meta's forward pass in miniature: neighbouring channels as complex numbers, weights
under Meta's names. The files are drawn at random in Meta's layout, so no conversion of ours stands between the two.
Where `llama_models` is installed its Transformer runs too, with one-process stand-ins for fairscale's parallel layers.
"""

import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minisft.errors import NumericsError, UserError
from minisft.model import weights
from minisft.pretrained import MetaFolder, _config, from_pretrained, save_pretrained
from minisft.runs import lifecycle

VOCAB = 64
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "vocab_size": VOCAB, "multiple_of": 32,
          "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500_000.0}
INNER = 224  # 4 * 64 = 256, two thirds of it 170, times 1.3 is 221, the next multiple of 32


def random_state(params: dict[str, Any], *, tied: bool = False) -> dict[str, Tensor]:
    """All tensors of a model under Meta's names."""
    generator = torch.Generator().manual_seed(5)
    width, head, vocab = params["dim"], params["dim"] // params["n_heads"], params["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, width), "norm.weight": (width,),
                                          "output.weight": (vocab, width)}
    for n in range(params["n_layers"]):
        keys = (params["n_kv_heads"] * head, width)
        block = {"attention.wq": (width, width), "attention.wk": keys, "attention.wv": keys,
                 "attention.wo": (width, width), "feed_forward.w1": (INNER, width), "feed_forward.w2": (width, INNER),
                 "feed_forward.w3": (INNER, width), "attention_norm": (width,), "ffn_norm": (width,)}
        shapes |= {f"layers.{n}.{name}.weight": shape for name, shape in block.items()}
    state = {name: torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1) for name, shape in shapes.items()}
    if tied:
        state["output.weight"] = state["tok_embeddings.weight"].clone()
    return state


def write(folder: Path, params: dict[str, Any], state: dict[str, Tensor], parts: int = 1) -> Path:
    """Divide `state` as Meta's model-parallel ranks hold it: rows, but columns of the projections back to the width."""
    (folder / "params.json").write_text(json.dumps(params))
    for part in range(parts):
        piece = {"rope.freqs": torch.zeros(8)}
        for name, tensor in state.items():
            columns = ".wo." in name or ".w2." in name
            piece[name] = tensor if tensor.dim() == 1 else tensor.chunk(parts, dim=int(columns))[part].clone()
        torch.save(piece, folder / f"consolidated.{part:02}.pth")
    return folder


def meta_logits(params: dict[str, Any], state: dict[str, Tensor], tokens: Tensor,
                factor: float | None = None) -> Tensor:
    """(T,) -> (T, V), with rotary wavelengths stretched by `factor`."""
    heads, groups, width = params["n_heads"], params["n_kv_heads"], params["dim"] // params["n_heads"]
    radians = [_stretch(params["rope_theta"] ** (-i / width), factor) for i in range(0, width, 2)]
    angles = torch.outer(torch.arange(len(tokens)).double(), torch.tensor(radians).double())
    turn = torch.polar(torch.ones_like(angles), angles)[:, None].to(torch.complex64)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def rotated(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    x = state["tok_embeddings.weight"][tokens]
    future = torch.ones(len(tokens), len(tokens)).triu(1).bool()
    for n in range(params["n_layers"]):
        w = {name.split(".", 2)[2].removesuffix(".weight"): t for name, t in state.items() if f"layers.{n}." in name}
        h = norm(x, w["attention_norm"])
        q = rotated((h @ w["attention.wq"].T).unflatten(1, (heads, -1)))
        k = rotated((h @ w["attention.wk"].T).unflatten(1, (groups, -1)))
        v = (h @ w["attention.wv"].T).unflatten(1, (groups, -1))
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q, k) / math.sqrt(width)
        attended = torch.einsum("hqk,khe->qhe", scores.masked_fill(future, -math.inf).softmax(-1), v)
        x = x + attended.flatten(1) @ w["attention.wo"].T
        h = norm(x, w["ffn_norm"])
        x = x + (F.silu(h @ w["feed_forward.w1"].T) * (h @ w["feed_forward.w3"].T)) @ w["feed_forward.w2"].T
    return norm(x, state["norm.weight"]) @ state["output.weight"].T


def _stretch(radians: float, factor: float | None) -> float:
    wavelength = 2 * math.pi / radians
    if factor is None or wavelength < 8192 / 4:
        return radians
    if wavelength > 8192:
        return radians / factor
    smooth = (8192 / wavelength - 1) / 3
    return (1 - smooth) * radians / factor + smooth * radians


TOKENS = torch.arange(200) * 7 % VOCAB


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_are_metas(parts: int, kv_heads: int, tmp_path: Path) -> None:
    params = {**PARAMS, "n_kv_heads": kv_heads}
    state = random_state(params)
    model = from_pretrained(write(tmp_path, params, state, parts), format="meta")
    expected = meta_logits(params, state, TOKENS)
    assert expected.std() > 0.5
    torch.testing.assert_close(model.logits(TOKENS), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("tied", "factor"), [(False, 8.0), (True, 32.0)])
def test_scaled_rope_is_by_8_and_by_32_in_the_tied_models(tied: bool, factor: float, tmp_path: Path) -> None:
    """As the config.json files that Meta released beside these say; params.json has only `use_scaled_rope`."""
    params = {**PARAMS, "use_scaled_rope": True}
    state = random_state(params, tied=tied)
    model = from_pretrained(write(tmp_path, params, state), format="meta")
    assert model.config.tie_word_embeddings == tied
    assert model.config.max_position_embeddings == 131_072
    expected = meta_logits(params, state, TOKENS, factor)
    assert (expected - meta_logits(params, state, TOKENS)).abs().max() > 0.1  # the scaling is not idle here
    torch.testing.assert_close(model.logits(TOKENS), expected, atol=2e-4, rtol=0)


def test_a_converted_folder_is_the_same_network(tmp_path: Path) -> None:
    params = {**PARAMS, "use_scaled_rope": True}
    model = from_pretrained(write(tmp_path, params, random_state(params), 2), format="meta")
    save_pretrained(model, tmp_path / "hf", dtype=torch.float32)
    again = from_pretrained(tmp_path / "hf")
    assert again.config == model.config
    assert torch.equal(again.logits(TOKENS), model.logits(TOKENS))


@pytest.mark.parametrize(("params", "inner"), [
    ({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14_336),  # 3 and 3.1 8B
    ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28_672),  # 70B
    ({"dim": 16_384, "multiple_of": 4096, "ffn_dim_multiplier": 1.2}, 53_248),  # 405B
    ({"dim": 2048, "multiple_of": 256, "ffn_dim_multiplier": 1.5}, 8192),  # 3.2 1B
    ({"dim": 3072, "multiple_of": 256, "ffn_dim_multiplier": 1.0}, 8192),  # 3.2 3B
])
def test_the_inner_width_is_the_published_one(params: dict[str, Any], inner: int) -> None:
    config = _config({**PARAMS, **params, "n_heads": 16, "n_kv_heads": 8}, vocab_size=VOCAB, tied=False)
    assert config.intermediate_size == inner


def test_llama_3s_text_begins_and_ends_as_it_does() -> None:
    """params.json does not say; without them transformers would generate to its limit. Other vocabularies: unknown."""
    config = _config(PARAMS, vocab_size=128_256, tied=False)
    assert (config.bos_token_id, config.eos_token_id) == (128_000, 128_001)  # <|begin_of_text|>, <|end_of_text|>
    assert _config(PARAMS, vocab_size=VOCAB, tied=False).eos_token_id is None


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_rows_are_read_in_any_pieces(tmp_path: Path, parts: int) -> None:
    """FSDP ranks ask for rows: the pieces are those of the whole, also where they cut a head, or a file does."""
    source = MetaFolder(write(tmp_path, PARAMS, random_state(PARAMS), parts))
    for name, shape in source.shapes.items():
        whole = source.read(name, 0, shape[0])
        assert tuple(whole.shape) == shape
        for each in (1, shape[0] // 3 + 1):
            pieces = [source.read(name, i, min(i + each, shape[0])) for i in range(0, shape[0], each)]
            assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("name", ["tok_embeddings", "layers.1.attention.wq", "layers.0.feed_forward.w2", "norm"])
@pytest.mark.parametrize("kind", ["meta", "hf"])
def test_a_fingerprint_tells_weights_apart_that_differ_in_their_last_row(tmp_path: Path, kind: str, name: str) -> None:
    found = []
    for change in (0, 1e-3):
        (folder := tmp_path / str(change)).mkdir()
        state = random_state(PARAMS)
        state[f"{name}.weight"][-1] += change
        source: Any = MetaFolder(write(folder, PARAMS, state, 2))
        if kind == "hf":
            save_pretrained(from_pretrained(folder, format="meta"), folder, dtype=torch.float32)
            source = weights.SafetensorsFolder(folder)
        found += [weights.fingerprint(source), weights.fingerprint(source)]
    assert found[0] == found[1] != found[2] == found[3]


# Refusals


def refusal(folder: Path) -> str:
    with pytest.raises((UserError, NumericsError)) as caught:
        from_pretrained(folder, format="meta")
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, PARAMS, random_state(PARAMS), 2)


def spoil(folder: Path, change: Any, part: int = 0) -> str:
    """The message, after `change` of one file's dict of tensors."""
    file = folder / f"consolidated.{part:02}.pth"
    state = torch.load(file, weights_only=True)
    torch.save(change(state), file)
    return refusal(folder)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()
    assert "consolidated.00.pth is missing; download the model again" in refusal(folder)
    (folder / "consolidated.01.pth").unlink()
    assert "no consolidated.*.pth; for a Hugging Face folder leave model.format at 'hf'" in refusal(folder)


def test_a_missing_last_part_shows_in_the_shapes(folder: Path) -> None:
    (folder / "consolidated.01.pth").unlink()
    message = refusal(folder)
    assert "model.layers.0.self_attn.q_proj.weight: the file has [32, 64], config.json asks for [64, 64]" in message


def test_damaged_files_are_named(folder: Path) -> None:
    file = folder / "consolidated.01.pth"
    whole = file.read_bytes()
    for content in (b"", b"\x80", b"garbage" * 9, *(whole[: len(whole) * i // 7] for i in range(1, 7)), whole[:-1]):
        file.write_bytes(content)
        assert f"{file}: not a readable checkpoint (" in refusal(folder)


def test_a_pipe_is_refused(folder: Path) -> None:
    (file := folder / "consolidated.00.pth").unlink()
    os.mkfifo(file)
    assert f"{file}: a pipe or a device, not a regular file" in refusal(folder)


def test_a_pickle_that_runs_code_is_refused(folder: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "was_here",))

    torch.save({"tok_embeddings.weight": torch.zeros(1), "x": Hostile()}, folder / "consolidated.00.pth")
    assert "consolidated.00.pth: not a readable checkpoint (UnpicklingError" in refusal(folder)
    assert not (folder / "was_here").exists()


def test_wrong_tensors_are_named(folder: Path) -> None:
    good = torch.load(folder / "consolidated.00.pth", weights_only=True)
    norm, up = "norm.weight", "layers.1.feed_forward.w3.weight"
    assert "it has no tok_embeddings.weight" in spoil(folder, lambda _: [1, 2])
    assert "it has no tok_embeddings.weight" in spoil(folder, lambda _: {"model": good})
    message = spoil(folder, lambda _: good | {norm: good[norm].char()})
    assert f"{norm} is stored as torch.int8; quantised weights cannot be fine-tuned" in message
    assert f"{norm} is stored as int" in spoil(folder, lambda _: good | {norm: 3})
    assert f"{norm} is stored as torch.sparse_coo" in spoil(folder, lambda _: good | {norm: good[norm].to_sparse()})
    assert f"{norm} is stored as torch.float32 on meta" in spoil(folder, lambda _: good | {norm: good[norm].to("meta")})
    hostile = spoil(folder, lambda _: good | {"\x1b[2J": 3})
    assert "\\x1b[2J is stored as int" in hostile
    lacking = {name: t for name, t in good.items() if name != up}
    assert "consolidated.01.pth: its tensors differ in name or shape from those of consolidated.00.pth" in spoil(
        folder, lambda _: lacking)
    assert "model.layers.1.mlp.up_proj.weight: missing" in spoil(folder, lambda _: lacking, 1)
    (folder / "consolidated.00.pth").write_bytes((folder / "consolidated.01.pth").read_bytes())
    extra = good | {"layers.0.attention.wq.scales": torch.zeros(2, 2), "text_model.norm": torch.zeros(())}
    spoil(folder, lambda _: extra)
    message = spoil(folder, lambda _: extra, 1)
    assert "layers.0.attention.wq.scales: not part of the model" in message
    assert "text_model.norm: not part of the model" in message


def test_tensors_larger_than_their_file_are_refused_before_they_are_read(folder: Path) -> None:
    """One number with a stride of 0 is a matrix of 64 GiB."""
    bomb = torch.zeros(1).expand(2**17, 2**17)
    message = spoil(folder, lambda good: good | {"layers.0.attention.wq.weight": bomb})
    assert "consolidated.00.pth: its tensors would take 64.0 GiB" in message
    assert "download the model again" in message


def test_a_number_that_is_not_finite_is_found_while_loading(folder: Path) -> None:
    def change(good: dict[str, Tensor]) -> dict[str, Tensor]:
        good["layers.1.attention.wq.weight"][3, 5] = float("nan")
        return good

    message = spoil(folder, change, 1)
    assert message.startswith(f"{folder}: model.layers.1.self_attn.q_proj.weight has numbers that are not finite")


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000, b"{}", b'"dim"'])
def test_params_that_are_none_are_refused(folder: Path, content: bytes) -> None:
    (folder / "params.json").write_bytes(content)
    assert "params.json: not Meta's parameters of a Llama-3 (" in refusal(folder)
    (folder / "params.json").unlink()
    assert "No such file" in refusal(folder)


def test_every_llama_3_states_its_theta(folder: Path) -> None:
    """Llama-2's files leave it out, and their embeddings are divided otherwise."""
    (folder / "params.json").write_text(json.dumps({name: PARAMS[name] for name in PARAMS if name != "rope_theta"}))
    assert "KeyError: 'rope_theta'" in refusal(folder)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(
    st.sampled_from([*PARAMS, "use_scaled_rope", "rope_scaling_factor"]),
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3) | st.just(10**400)
    | st.lists(st.integers(), max_size=2), min_size=1, max_size=2))
def test_any_params_are_a_network_or_a_user_error(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | changes))
    try:
        model = from_pretrained(folder, format="meta")
    except UserError as error:
        assert str(folder) in str(error)  # noqa: PT017 (either outcome is lawful)
    else:
        assert bool(model.logits(TOKENS[:3]).isfinite().all())


def test_a_run_from_metas_files_is_the_one_from_hugging_faces(base: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses, and the same share of the processor's peak."""
    monkeypatch.setattr(lifecycle, "peak_flops", lambda device: 1e9)
    params = {**PARAMS, "vocab_size": json.loads((base / "config.json").read_text())["vocab_size"]}
    (tmp_path / "meta").mkdir()
    write(tmp_path / "meta", params, random_state(params), 2)
    save_pretrained(from_pretrained(tmp_path / "meta", format="meta"), tmp_path / "hf", dtype=torch.float32)
    logs = [small_runs.train(tmp_path / kind, tmp_path / f"run-{kind}", train__max_steps=2, model__format=kind,
                             model__tokenizer=base) for kind in ("meta", "hf")]
    assert [record["loss"] for record in logs[0]] == [record["loss"] for record in logs[1]]
    work = [[record["mfu"] * record["seconds"] for record in log] for log in logs]
    assert work[0] == pytest.approx(work[1])


# Meta's own code


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """llama_models' Transformer; fairscale's parallel layers in one process are the plain ones."""
    pytest.importorskip("llama_models")

    class ParallelLinear(nn.Linear):
        def __init__(self, inputs: int, outputs: int, bias: bool = True, **_: Any) -> None:
            super().__init__(inputs, outputs, bias=bias)

    class ParallelEmbedding(nn.Embedding):
        def __init__(self, rows: int, width: int, **_: Any) -> None:
            super().__init__(rows, width)

    layers = types.ModuleType("fairscale.nn.model_parallel.layers")
    layers.ColumnParallelLinear = layers.RowParallelLinear = ParallelLinear
    layers.VocabParallelEmbedding = ParallelEmbedding
    initialize = types.ModuleType("fairscale.nn.model_parallel.initialize")
    initialize.get_model_parallel_world_size = lambda: 1
    parallel = types.ModuleType("fairscale.nn.model_parallel")
    parallel.layers, parallel.initialize = layers, initialize
    for module in (types.ModuleType("fairscale"), types.ModuleType("fairscale.nn"), parallel, layers, initialize):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return pytest.importorskip("llama_models.llama3.model", exc_type=ImportError)


@pytest.mark.parametrize("scaled", [False, True])
def test_logits_are_those_of_llama_models(reference: Any, scaled: bool, tmp_path: Path) -> None:
    params = {**PARAMS, "n_kv_heads": 2, "use_scaled_rope": scaled}
    state = random_state(params)
    theirs = reference.Transformer(reference.ModelArgs(**params, max_seq_len=256, max_batch_size=1))
    theirs.load_state_dict(state)
    expected = theirs(TOKENS[None], 0)[0]
    ours = from_pretrained(write(tmp_path, params, state), format="meta").logits(TOKENS)
    difference = (ours - expected).abs().max().item()
    print(f"largest difference of logits: {difference:.1e}")
    assert difference < 2e-4
    assert (expected - meta_logits(params, state, TOKENS, 8.0 if scaled else None)).abs().max() < 2e-4
