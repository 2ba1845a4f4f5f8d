"""The network computes what transformers' Llama computes, and documents in a stream never see each other.

Two oracles: `transformers`, and `naive_logits` below, which shares no idea with the package: float64, a whole T x T
mask made from document numbers, rotary embeddings as complex numbers, the scaling of the wavelengths as Meta wrote it.
Weights are drawn large, so that attention is far from uniform and a wrong angle or mask changes the logits visibly.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from minisft.cpu import kernels
from minisft.model import llama
from minisft.model.llama import Documents, Llama, rotations
from minisft.model.llama_config import LlamaConfig
from minisft.pretrained import from_pretrained, save_pretrained

transformers = pytest.importorskip("transformers")

VOCAB = 67
SCALED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 10_000.0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "theta 500000": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "scaled by 8": {"rope_parameters": {**SCALED, "factor": 8.0}},
    "scaled by 32": {"rope_parameters": {**SCALED, "factor": 32.0}, "tie_word_embeddings": True},
    "tied": {"tie_word_embeddings": True},
    "no groups": {"num_key_value_heads": 4},
    "one group, wide heads": {"num_key_value_heads": 1, "head_dim": 24},
    "biases, eps": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.1},
}


def hf_model(seed: int = 0, **changes: Any) -> Any:
    """A random transformers model, with the rotary bands of 16 channels: fast, blended and slow ones."""
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, **changes}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def saved(model: Any, folder: Path, *, old_spelling: bool = False) -> Path:
    model.save_pretrained(folder)
    if old_spelling:
        file = folder / "config.json"
        raw = json.loads(file.read_text())
        rope = raw.pop("rope_parameters")
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = rope if rope["rope_type"] == "llama3" else None
        file.write_text(json.dumps(raw))
    return folder


def tokens_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def naive_logits(model: Any, tokens: Tensor, lengths: list[int]) -> Tensor:
    """(T,) -> (T, V) in float64, from the parameters of a transformers model."""
    config, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, groups, width, rope = (config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                                  config.rope_parameters)
    document = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)])
    position = torch.tensor([i for length in lengths for i in range(length)]).double()
    hidden_from = (document[:, None] != document) | torch.ones(len(tokens), len(tokens)).triu(1).bool()
    radians = torch.tensor([_scaled(rope["rope_theta"] ** (-2 * i / width), rope) for i in range(width // 2)]).double()
    turn = torch.polar(torch.ones(len(tokens), width // 2).double(), position[:, None] * radians)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * w[f"{name}.weight"]

    def project(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def rotated(x: Tensor) -> Tensor:
        z = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    x = w["model.embed_tokens.weight"][tokens]
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        h = norm(x, f"{layer}.input_layernorm")
        q = rotated(project(h, f"{layer}.self_attn.q_proj").view(len(tokens), heads, width))
        k = rotated(project(h, f"{layer}.self_attn.k_proj").view(len(tokens), groups, width))
        v = project(h, f"{layer}.self_attn.v_proj").view(len(tokens), groups, width)
        out = []
        for head in range(heads):
            group = head * groups // heads
            scores = (q[:, head] @ k[:, group].T / math.sqrt(width)).masked_fill(hidden_from, -math.inf)
            out.append(scores.softmax(dim=-1) @ v[:, group])
        x = x + project(torch.cat(out, dim=-1), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = project(h, f"{layer}.mlp.gate_proj")
        x = x + project(gate * torch.sigmoid(gate) * project(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return norm(x, "model.norm") @ w[head].T


def _scaled(radians: float, rope: dict[str, Any]) -> float:
    if rope["rope_type"] == "default":
        return radians
    context, low, high = (rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"])
    wavelength = 2 * math.pi / radians
    if wavelength < context / high:
        return radians
    if wavelength > context / low:
        return radians / rope["factor"]
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * radians / rope["factor"] + smooth * radians


@pytest.mark.parametrize("old_spelling", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, old_spelling: bool, tmp_path: Path) -> None:
    theirs = hf_model(seed=len(case), **CASES[case])
    ours = from_pretrained(saved(theirs, tmp_path, old_spelling=old_spelling))
    tokens = tokens_of(100)
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(ours.logits(tokens), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(expected.double(), naive_logits(theirs, tokens, [100]), atol=5e-4, rtol=0)


def test_the_scaled_cases_have_all_three_bands() -> None:
    wavelengths = [2 * math.pi * 10_000.0 ** (2 * i / 16) for i in range(8)]
    bands = [sum(x < 8 for x in wavelengths), sum(8 <= x <= 32 for x in wavelengths), sum(x > 32 for x in wavelengths)]
    assert bands == [1, 1, 6]


@pytest.mark.skipif("MINISFT_SMOLLM2" not in os.environ, reason="MINISFT_SMOLLM2 names no folder with SmolLM2-135M")
def test_a_published_model_has_the_logits_of_transformers() -> None:
    path = os.environ["MINISFT_SMOLLM2"]
    theirs = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(theirs.config.vocab_size, (256,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (from_pretrained(path).logits(tokens) - theirs(tokens[None]).logits[0]).abs().max().item()
    print(f"largest difference of logits: {difference:.1e}")
    assert difference < 1e-4


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Llama]:
    """The same scaled, grouped, biased model twice: transformers' and ours."""
    theirs = hf_model(seed=7, attention_bias=True, rope_parameters={**SCALED, "factor": 8.0})
    return theirs, from_pretrained(saved(theirs, tmp_path_factory.mktemp("model")))


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@settings(max_examples=20, derandomize=True)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_packed_documents_are_computed_as_if_alone(pair: tuple[Any, Llama], lengths: list[int], seed: int) -> None:
    theirs, ours = pair
    tokens = tokens_of(sum(lengths), seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = ours.logits(tokens, offsets)
    alone = torch.cat([ours.logits(document) for document in tokens.split(lengths)])
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(packed.double(), naive_logits(theirs, tokens, lengths), atol=5e-4, rtol=0)


def test_no_token_of_a_document_reaches_another_or_an_earlier_one(pair: tuple[Any, Llama]) -> None:
    tokens, offsets = tokens_of(30), torch.tensor([0, 11, 12, 30])
    changed = tokens.clone()
    changed[20:] = (changed[20:] + 1) % VOCAB  # in the third document
    before, after = pair[1].logits(tokens, offsets), pair[1].logits(changed, offsets)
    assert torch.equal(before[:20], after[:20])
    assert (before[20:] - after[20:]).abs().amax(dim=1).min() > 0.01


@pytest.mark.parametrize("offsets", [[0, 3], [0, 3, 11], [1, 10], [0, 5, 5, 10], [0, 7, 4, 10], [0], [10], [-1, 10]])
def test_wrong_offsets_are_refused(pair: tuple[Any, Llama], offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 10, not"):
        pair[1].logits(tokens_of(10), torch.tensor(offsets))


def gradients(model: Llama, tokens: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """Of the summed cross-entropy of every token against a target that follows from it."""
    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ head.T, (tokens * 5 + 3) % VOCAB, reduction="sum")

    model.zero_grad()
    model(tokens, Documents.of_lengths(tuple(lengths)), loss).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_a_pack_are_the_sum_over_its_documents(tied: bool, tmp_path: Path) -> None:
    model = from_pretrained(saved(hf_model(seed=3, attention_bias=True, tie_word_embeddings=tied), tmp_path))
    lengths = [9, 1, 17, 5]
    tokens = tokens_of(sum(lengths))
    packed = gradients(model, tokens, lengths)
    alone = [gradients(model, document, [len(document)]) for document in tokens.split(lengths)]
    for name, gradient in packed.items():
        expected = torch.stack([single[name] for single in alone]).sum(dim=0)
        torch.testing.assert_close(gradient, expected, atol=1e-5 * expected.abs().max().item(), rtol=0, msg=name)
        assert gradient.abs().max() > 0 or name.endswith("k_proj.bias")


def test_gradients_are_those_of_transformers(pair: tuple[Any, Llama]) -> None:
    theirs, ours = pair
    tokens = tokens_of(25)
    theirs.zero_grad()
    F.cross_entropy(theirs(tokens[None]).logits[0], (tokens * 5 + 3) % VOCAB, reduction="sum").backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in gradients(ours, tokens, [25]).items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5 * expected[name].abs().max().item() + 1e-4,
                                   rtol=0, msg=name)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_gradients_are_equal(pair: tuple[Any, Llama], monkeypatch, recompute: str) -> None:
    model = pair[1]
    kept = gradients(model, tokens_of(20), [12, 8])
    monkeypatch.setattr(model, "recompute", recompute)
    recomputed = gradients(model, tokens_of(20), [12, 8])
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def ulp(x: Tensor) -> Tensor:
    """Distance of neighbouring bf16 numbers around x: 8 significant bits."""
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=1e-30))) - 7)


def assert_is_rounded(got: Tensor, left: Tensor, right: Tensor) -> None:
    """`got` is left @ right in bf16: within one ulp, and what fp32 sums lose where terms cancel."""
    exact = left.double() @ right.double()
    lost = 2.0**-23 * left.shape[1] * (left.double().abs() @ right.double().abs())
    assert got.dtype == torch.bfloat16
    assert bool(((got.double() - exact.bfloat16().double()).abs() <= ulp(exact) + lost).all())


@pytest.mark.parametrize("widen", [True, False])
def test_bf16_products_are_exact_until_rounded(widen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if widen:
        monkeypatch.setattr(kernels, "CPU_MATMULS_IN_BF16", False)
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(shape).bfloat16() for shape in ((37, 96), (53, 96), (37, 53)))
    x.requires_grad_()
    weight.requires_grad_()
    y = llama.linear(x, weight)
    y.backward(grad)
    assert_is_rounded(y.detach(), x.detach(), weight.detach().T)
    assert_is_rounded(x.grad, grad, weight.detach())
    assert_is_rounded(weight.grad, grad.T, x.detach())


def test_a_bf16_layer_with_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CPU_MATMULS_IN_BF16", False)
    torch.manual_seed(0)
    layer = llama.Linear(64, 48).bfloat16()
    x = torch.randn(20, 64).bfloat16()
    y = layer(x)
    y.sum().backward()
    product = (x.double() @ layer.weight.double().T).detach()
    exact = product + layer.bias.detach().double()
    assert y.dtype == torch.bfloat16
    assert bool(((y - exact).abs() <= ulp(product) + ulp(exact)).all())  # rounded once as a product, once as a sum
    assert torch.equal(layer.bias.grad, torch.full((48,), 20.0).bfloat16())


def test_a_frozen_weight_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CPU_MATMULS_IN_BF16", False)
    x, weight = torch.randn(3, 4).bfloat16().requires_grad_(), torch.randn(5, 4).bfloat16()
    llama.linear(x, weight).sum().backward()
    assert weight.grad is None
    assert_is_rounded(x.grad, torch.ones(3, 5).bfloat16(), weight)


def test_a_bf16_model_is_close_to_the_fp32_one(pair: tuple[Any, Llama], tmp_path: Path) -> None:
    save_pretrained(pair[1], tmp_path)
    tokens, offsets = tokens_of(50), torch.tensor([0, 20, 50])
    wide = from_pretrained(tmp_path).logits(tokens, offsets)  # the weights themselves are rounded in both
    narrow = from_pretrained(tmp_path, dtype=torch.bfloat16).logits(tokens, offsets)
    assert narrow.dtype == torch.bfloat16
    assert (narrow - wide).pow(2).mean().sqrt() < 0.03 * wide.std()


def test_the_readout_decides_what_is_computed(pair: tuple[Any, Llama]) -> None:
    """The head is the caller's: asked for two tokens it computes two rows."""
    tokens, model = tokens_of(12), pair[1]
    readout: Callable[[Tensor, Tensor], Tensor] = lambda hidden, head: hidden[[3, 11]] @ head.T  # noqa: E731
    some = model(tokens, Documents.of_lengths((5, 7)), readout)
    torch.testing.assert_close(some, model.logits(tokens, torch.tensor([0, 5, 12]))[[3, 11]], atol=1e-5, rtol=0)


class Calls(TorchDispatchMode):
    """The operations that are run. A profile has those, too, that a checkpoint answers from memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True])
def test_selective_recomputation_multiplies_one_matrix_and_attends_never_again(
        compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 7 products forward, 14 backward; recomputed are `up` alone, or all but `down` and all documents."""
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    torch.manual_seed(0)
    block = Llama(config).model.layers[0]
    documents = Documents.of_lengths((5, 3))
    rotation = rotations(documents.positions, config)
    # This backend divides the graph between the passes as inductor does, and needs no compiler.
    run = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True) if compiled else block
    passes: list[object] = []  # of attention, each of which asks for the documents: forward, and once backward
    documents_of = kernels._documents
    monkeypatch.setattr(kernels, "_documents", lambda offsets: passes.append(0) or documents_of(offsets))
    gradients, calls, attended = {}, {}, []
    for recompute in ("none", "selective", "full"):
        for _ in range(1 + compiled):  # the first compiles
            block.zero_grad()
            passes.clear()
            x = torch.linspace(-1, 1, 8 * 32).reshape(8, 32).requires_grad_()
            with profile(activities=[ProfilerActivity.CPU]) if compiled else Calls() as watch:
                run(x, rotation, documents, recompute).square().sum().backward()
        calls[recompute] = Counter([event.name for event in watch.events()] if compiled else watch.names)
        attended.append(len(passes) - 1)
        gradients[recompute] = [x.grad, *(parameter.grad for parameter in block.parameters())]
    assert [calls[name]["aten::mm"] for name in calls] == [21, 22, 27]
    assert attended == [1, 1, 2]
    for found in gradients.values():
        assert all(torch.equal(ours, plain) for ours, plain in zip(found, gradients["none"], strict=True))


def test_the_gradient_of_a_bf16_embedding_is_summed_in_fp32():
    """A token that comes 3,000 times: in bf16 the sum stands still once it is 256 times an addend."""
    embedding = llama.Embedding(7, 100).bfloat16()
    tokens = torch.tensor([2] * 3000 + [5] * 3)
    grad = torch.rand(len(tokens), 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    embedding(tokens).backward(grad)
    expected = torch.zeros(7, 100, dtype=torch.float64).index_add_(0, tokens, grad.double())
    torch.testing.assert_close(embedding.weight.grad.double(), expected, rtol=2**-8, atol=0)
