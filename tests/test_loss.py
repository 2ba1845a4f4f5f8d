"""Two routes to one number: the chunked loss against the plain one, and the plain one against torch's."""

import pytest
import torch
import torch.nn.functional as F

from minisft.training import loss as loss_module
from minisft.training.loss import linear_cross_entropy, masked_cross_entropy


def draw(tokens=37, width=16, vocab=101, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator)


def test_the_plain_loss_is_torchs():
    logits, targets = torch.randn(50, 11), torch.randint(0, 11, (50,))
    targets[::3] = -100
    torch.testing.assert_close(masked_cross_entropy(logits, targets), F.cross_entropy(logits, targets))
    torch.testing.assert_close(masked_cross_entropy(logits, targets.where(targets >= 0, 7), ignore_index=7),
                               F.cross_entropy(logits, targets.where(targets >= 0, 7), ignore_index=7))


def test_nothing_trained_is_zero_and_still_has_gradients():
    logits = torch.randn(5, 7, requires_grad=True)
    loss = masked_cross_entropy(logits, torch.full((5,), -100))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros(5, 7))
    hidden, weight, _ = draw()
    loss = linear_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.int64), denominator=3)
    loss.backward()
    assert loss == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("chunk", [1, 5, 37, 1000])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2},
                                     {"label_smoothing": 0.2, "z_loss": 1e-3}])
def test_the_chunked_loss_is_the_plain_one(monkeypatch, chunk, options):
    """Value and gradients to 1e-5 in fp32; the oracle is autograd through the whole (T, vocab) logits."""
    monkeypatch.setattr(loss_module, "CHUNK", chunk * 101)
    hidden, weight, targets = draw()
    loss = linear_cross_entropy(hidden, weight, targets, denominator=29.0, **options) * 3
    got = torch.autograd.grad(loss, (hidden, weight))
    logits = hidden @ weight.T
    plain = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=options.get("label_smoothing", 0.0))
    plain = (plain + options.get("z_loss", 0.0) * (logits.logsumexp(-1) ** 2).sum()) / 29.0 * 3
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got, torch.autograd.grad(plain, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 37, 1000])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 1e-3}])
@pytest.mark.parametrize("unit", [1.0, 1e-90, 1e90])
def test_weights_multiply_each_targets_loss_with_all_its_terms(monkeypatch, chunk, options, unit):
    """Only their ratio counts, even beyond what fp32 holds; the oracle is autograd through the whole logits."""
    monkeypatch.setattr(loss_module, "CHUNK", chunk * 101)
    monkeypatch.setattr(loss_module, "CPU_SOFTMAX", 3 * 101)  # three rows at a time
    hidden, weight, targets = draw()
    weights = torch.tensor([0.3, 1.0, 2.5, 0.01])[torch.arange(37) % 4].double()
    total = float(weights.sum())
    loss = linear_cross_entropy(hidden, weight, targets, denominator=total * unit, target_weights=weights * unit,
                                **options)
    got = torch.autograd.grad(loss * 3, (hidden, weight))
    logits = hidden @ weight.T
    plain = F.cross_entropy(logits, targets, reduction="none", label_smoothing=options.get("label_smoothing", 0.0))
    plain = ((plain + options.get("z_loss", 0.0) * logits.logsumexp(-1) ** 2) * weights.float()).sum() / total
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got, torch.autograd.grad(plain * 3, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_weights_of_one_change_no_bit_of_the_gradients():
    hidden, weight, targets = draw()
    plain, weighted = (torch.autograd.grad(linear_cross_entropy(
        hidden, weight, targets, denominator=37.0, target_weights=weights, z_loss=1e-3), (hidden, weight))
        for weights in (None, torch.ones(37, dtype=torch.float64)))
    assert all(map(torch.equal, plain, weighted))


def test_bf16_gradients_are_those_of_exact_arithmetic_rounded_once(monkeypatch):
    """Many small chunks: a sum kept in bf16 would drift by far more than a rounding."""
    monkeypatch.setattr(loss_module, "CHUNK", 4 * 101)
    hidden, weight, targets = draw(tokens=400, dtype=torch.bfloat16)
    got = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, denominator=400.0), (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    reference = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, targets), exact)
    for ours, theirs in zip(got, reference, strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-2


def test_the_large_logits_never_exist(monkeypatch):
    """The largest tensor that is made is a chunk's logits or the head's gradient, not (T, vocab)."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in (out if isinstance(out, tuple) else [out])
                                      if isinstance(x, torch.Tensor))])
            return out

    monkeypatch.setattr(loss_module, "CHUNK", 512_000)
    hidden, weight, targets = draw(tokens=4096, width=8, vocab=1000)
    with Watch():
        linear_cross_entropy(hidden, weight, targets, denominator=1.0).backward()
    assert largest == 512_000


def test_no_gradient_is_computed_without_need(monkeypatch):
    hidden, weight, targets = draw()
    products, add = [], loss_module._add_product
    monkeypatch.setattr(loss_module, "_add_product", lambda *args, **kwargs: products.append(add(*args, **kwargs)))
    with torch.no_grad():  # as in an evaluation of a model that is trained
        assert not linear_cross_entropy(hidden, weight, targets, denominator=1.0).requires_grad
    assert not products
    linear_cross_entropy(hidden, weight.detach(), targets, denominator=1.0).backward()
    assert products
    assert weight.grad is None
    assert hidden.grad is not None


def test_fp32_weights_of_bf16_activations():
    """A lone process keeps fp32 weights: products are of rounded operands, gradients have each tensor's own dtype."""
    hidden, weight, targets = draw(tokens=60)
    narrow = hidden.detach().bfloat16().requires_grad_()
    got = torch.autograd.grad(linear_cross_entropy(narrow, weight, targets, denominator=60.0), (narrow, weight))
    exact = [hidden.detach().bfloat16().double().requires_grad_(), weight.detach().bfloat16().double().requires_grad_()]
    reference = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, targets), exact)
    for ours, theirs, dtype in zip(got, reference, (torch.bfloat16, torch.float32), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-2


def test_gradients_do_not_live_as_long_as_the_loss():
    hidden, weight, targets = draw()
    loss = linear_cross_entropy(hidden, weight, targets, denominator=1.0)
    held = loss.grad_fn.gradients
    loss.backward()
    assert held is not None
    assert loss.grad_fn.gradients is None
