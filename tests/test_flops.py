"""The estimate of FLOPs is the count of what the network multiplies.

The oracle watches every matrix product that torch executes in real forward and backward passes, with an attention that
computes each pair of tokens by itself, so that a causal mask hides no work.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minisft.config import LoraConfig
from minisft.lora.adapters import adapt
from minisft.lora.targets import ranks
from minisft.model import llama
from minisft.model.flops import peak_flops, training_flops
from minisft.model.llama import Documents
from minisft.model.llama_config import MATRICES, PRESETS, LlamaConfig
from minisft.training.loss import linear_cross_entropy

SMALL = LlamaConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=10)


class Products(TorchDispatchMode):
    """Counts the multiplications and additions of all matrix products."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        return function(*args, **(kwargs or {}))


def attend_pair_by_pair(q, k, v, documents):
    """Attention (T, H, E), one query token at a time over exactly the tokens it may see."""
    groups, out, start = q.shape[1] // k.shape[1], [], 0
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    for length in documents.offsets.diff().tolist():
        for i in range(start, start + length):
            keys, values = (x[start : i + 1].transpose(0, 1) for x in (k, v))  # (H, seen, E)
            scores = torch.bmm(q[i, :, None], keys.transpose(1, 2)) / q.shape[2] ** 0.5
            out.append(torch.bmm(scores.softmax(dim=-1), values)[:, 0])
        start += length
    return torch.stack(out)


def counted(config, lengths, targets, *, recompute, monkeypatch, lora=None):
    monkeypatch.setattr(llama.Attention, "attend", staticmethod(attend_pair_by_pair))
    monkeypatch.setattr(llama, "ATTENTION", ("aten::bmm",))
    model = llama.Llama(config, recompute=recompute)
    if lora:
        adapt(model, lora)
    at = torch.cat([torch.arange(n) + sum(lengths[:i]) for i, n in enumerate(targets)])

    def loss(hidden, head):
        return linear_cross_entropy(hidden[at], head, torch.zeros_like(at), denominator=1.0)

    with Products() as products:
        model(torch.zeros(sum(lengths), dtype=torch.int64), Documents.of_lengths(tuple(lengths)), loss).backward()
    return products.flops


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("change", [{}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True},
                                    {"attention_bias": True, "mlp_bias": True}])
def test_the_estimate_is_what_torch_multiplies(monkeypatch, change, recompute):
    config = LlamaConfig(**{**{name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}, **change})
    lengths, targets = [7, 1, 12, 3], [2, 0, 11, 1]
    expected = counted(config, lengths, targets, recompute=recompute, monkeypatch=monkeypatch)
    assert expected > 0
    assert training_flops(config, np.array(lengths), np.array(targets), recompute=recompute) == expected


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("targets", [MATRICES, ("v_proj",), ("q_proj", "v_proj"), ("o_proj", "down_proj"),
                                     ("layers.1.*", "layers.0.mlp.up_proj"), ("layers.2.mlp.down_proj",)])
def test_adapters_are_counted_as_torch_multiplies_them(monkeypatch, recompute, targets):
    """Also where they are only in some layers, and what comes before them has no backward pass."""
    lengths, trained = [7, 1, 12, 3], [2, 0, 11, 1]
    lora = LoraConfig(3, targets=targets, base="fp32")
    expected = counted(SMALL, lengths, trained, recompute=recompute, monkeypatch=monkeypatch, lora=lora)
    found = training_flops(SMALL, np.array(lengths), np.array(trained), recompute=recompute,
                           ranks=ranks(lora, SMALL))
    assert found == expected
    assert found < training_flops(SMALL, np.array(lengths), np.array(trained), recompute=recompute)


def test_a_token_of_llama_3_8b_costs_six_flops_a_parameter():
    """By hand: 6.98 billion parameters in the blocks, 0.53 billion in the head; one token attends to itself."""
    block = 4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14_336
    attention = 32 * 3 * 4 * 4096
    found = training_flops(PRESETS["llama-3-8b"], np.array([1]), np.array([1]))
    assert found == 6 * (32 * block + 4096 * 128_256) + attention
    assert training_flops(PRESETS["llama-3-8b"], np.array([], dtype=np.int64), np.array([], dtype=np.int64)) == 0


def test_the_peak_of_a_gpu_is_known_by_what_its_driver_calls_it(monkeypatch):
    names = ("NVIDIA H100 80GB HBM3", "x")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    assert [peak_flops(torch.device(name)) for name in ("cuda:0", "cuda:1", "cpu")] == [989e12, None, None]
