"""The schedule against closed forms, and AdamW against the paper's algorithm in NumPy."""

import math

import numpy as np
import pytest
import torch

from minisft.config import OptimConfig
from minisft.lean.adamw import LeanAdamW
from minisft.training import optimizer as optimizer_module
from minisft.training.optimizer import AdamW, learning_rate


def rates(total=100, **options):
    optim = OptimConfig(**{"lr": 2.0, "warmup_steps": 0, **options})
    return [learning_rate(step, total, optim) for step in range(total)]


def test_warmup_is_a_line_that_wastes_no_step():
    assert rates(warmup_steps=4, schedule="constant")[:6] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_the_rate_never_rises_after_warmup_nor_leaves_its_bounds(schedule):
    values = rates(schedule=schedule, warmup_steps=10, min_lr_ratio=0.1)
    assert max(values) == 2.0
    assert values[9:] == sorted(values[9:], reverse=True)
    assert min(values[9:]) >= 0.2


def test_closed_forms():
    cosine, linear = rates(warmup_steps=20), rates(warmup_steps=20, schedule="linear")
    for step in range(20, 100):
        assert cosine[step] == pytest.approx(1 + math.cos(math.pi * (step - 20) / 80))
        assert linear[step] == pytest.approx(2 * (1 - (step - 20) / 80))


def test_wsd_stays_and_then_decays_over_the_last_share():
    values = rates(schedule="wsd", warmup_steps=10, decay_fraction=0.2)
    assert values[9:81] == [2.0] * 72
    assert values[80:] == pytest.approx([2.0 * (1 - i / 20) for i in range(20)])


def test_wsd_decays_in_the_shortest_run_too():
    assert rates(total=4, schedule="wsd", decay_fraction=0.1) == [2.0, 2.0, 2.0, 1.0]
    assert rates(total=4, schedule="wsd", decay_fraction=0.0) == [2.0] * 4


def test_a_run_shorter_than_its_warmup_stays_on_the_line():
    assert rates(total=5, warmup_steps=10) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_adamw_is_the_papers():
    """Loshchilov and Hutter 2019, algorithm 2, in NumPy; matrices decay, vectors do not."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    before = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    optimizer = AdamW(model, OptimConfig(weight_decay=0.1))
    m = {name: np.zeros_like(p) for name, p in before.items()}
    v = {name: np.zeros_like(p) for name, p in before.items()}
    for t in range(1, 6):
        lr = 0.01 * t
        optimizer.begin(lr, t)
        model(torch.randn(7, 5)).square().mean().backward()
        for name, p in model.named_parameters():
            g = p.grad.double().numpy()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            update = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            before[name] -= lr * (update + (0.1 * before[name] if p.dim() > 1 else 0))
        norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
        assert float(optimizer.clip(0)) == pytest.approx(norm, rel=1e-5)
        optimizer.step()
        assert all(p.grad is None for p in model.parameters())
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), before[name], rtol=1e-5, atol=1e-6)


def test_a_large_gradient_is_scaled_and_a_small_one_is_not():
    model = torch.nn.Linear(4, 4, bias=False)
    for largest, expected in ((0.5, 0.5), (100.0, 8.0)):
        model.weight.grad = torch.full((4, 4), 2.0)  # norm 8
        optimizer = AdamW(model)
        assert float(optimizer.clip(largest)) == pytest.approx(8.0)
        assert float(model.weight.grad.norm()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_exact_at_the_size_of_a_large_matrix(dtype):
    """Against float64: in one sum a CPU reports 0.5% less, and clips to 1.005 instead of 1."""
    model = torch.nn.Linear(4096, 14336, bias=False, dtype=dtype)
    optimizer = AdamW(model) if dtype == torch.float32 else LeanAdamW(model, OptimConfig(moments="bf16"))
    gradient = torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(0)).mul_(0.01).to(dtype)
    expected = float(gradient.double().norm())
    model.weight.grad = gradient
    optimizer.begin(1e-5, 0)
    assert float(optimizer.clip(1.0)) == pytest.approx(expected, rel=1e-5)
    assert float(model.weight.grad.double().norm()) == pytest.approx(1.0, rel=1e-5 if dtype == torch.float32 else 1e-3)


def test_an_empty_and_an_odd_gradient_count_too():
    parts = [torch.zeros(0), torch.randn(70_001), torch.randn(3, 5), torch.randn(2**16)]
    expected = math.sqrt(sum(float(part.double().norm()) ** 2 for part in parts))
    assert float(optimizer_module.gradient_norm(parts)) == pytest.approx(expected, rel=1e-6)
