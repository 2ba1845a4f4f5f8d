"""Attention by document against the definition: softmax over the earlier tokens of one's own document, with a mask."""

import pytest
import torch

from minisft.cpu.kernels import ROWS, document_attention
from minisft.model.llama import Documents, RMSNorm, attend, linear

LENGTHS = [(5,), (1, 1, 3), (ROWS - 1, ROWS, ROWS + 1), (2 * ROWS + 7, 2)]


def draw(tokens, heads, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, n, 16, generator=generator).mul(2).to(dtype).requires_grad_()
            for n in (heads, heads // 3, heads // 3)]


def naive(q, k, v, lengths):
    """One (T, T) matrix of scores for each head, with everything masked that must not be seen."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def both(q, k, v, lengths, attention):
    out = attention(q, k, v, lengths)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    return [out, *torch.autograd.grad((out.double() * weights).sum(), (q, k, v))]


def ours(q, k, v, lengths):
    return attend(q, k, v, Documents.of_lengths(lengths))


def operator(q, k, v, lengths):
    return document_attention(q, k, v, Documents.of_lengths(lengths).offsets)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_values_and_gradients_are_those_of_the_mask(lengths):
    q, k, v = draw(sum(lengths), 6, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    for got, wanted in zip(both(q, k, v, lengths, ours), both(*exact, lengths, naive), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", [ours, operator])
def test_bf16_rounds_weights_and_results_only(attention):
    """With scores or sums over blocks in bf16 it would be worse. The operator itself does not widen bf16 first."""
    lengths = (1000, 3)
    q, k, v = draw(sum(lengths), 3, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    for got, wanted in zip(both(q, k, v, lengths, attention), both(*exact, lengths, naive), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - wanted).norm() / wanted.norm() < 6e-3


@pytest.mark.parametrize("heads_first", [False, True])
def test_it_is_a_proper_operator(heads_first):
    """Shapes and strides of its fake are its own, and it can be traced and differentiated: torch's own check."""
    q, k, v = draw(ROWS + 9, 6, torch.float32)
    if heads_first:  # in memory
        q, k, v = (x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v))
    offsets = torch.tensor([0, ROWS, ROWS + 9], dtype=torch.int32)
    torch.library.opcheck(document_attention, (q, k, v, offsets))
    backward = torch.ops.minisft.document_attention_backward.default
    torch.library.opcheck(backward, (*(x.detach() for x in (q, q, k, v)), offsets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_its_definition(dtype):
    torch.manual_seed(0)
    norm, x, grad = RMSNorm(32, 1e-5), torch.randn(20, 32).to(dtype).requires_grad_(), torch.randn(20, 32).to(dtype)
    norm.weight.data.normal_()
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().to(dtype).double().requires_grad_()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    exact.backward(grad.double())
    y = norm(x)
    y.backward(grad)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for got, wanted in ((y, exact), (x.grad, wide.grad), (norm.weight.grad, weight.grad)):
        torch.testing.assert_close(got.double(), wanted, **close)


def test_products_of_fp32_weights_are_those_of_rounded_ones():
    x, weight = torch.randn(9, 16).bfloat16().requires_grad_(), torch.randn(5, 16).requires_grad_()
    rounded = weight.detach().bfloat16().requires_grad_()
    got, wanted = linear(x, weight), linear(x, rounded)
    grads = torch.autograd.grad(got.sum(), (x, weight))
    assert torch.equal(got, wanted)
    assert grads[1].dtype == torch.float32
    for ours, theirs in zip(grads, torch.autograd.grad(wanted.sum(), (x, rounded)), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))
