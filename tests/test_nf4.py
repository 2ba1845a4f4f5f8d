"""NF4 against bitsandbytes, against a naive NumPy reading of the paper, and read by parts as FSDP holds it."""

import warnings

import numpy as np
import pytest
import torch

from minisft.lora.nf4 import BLOCK, CODES, GROUP, NF4, dequantise, dynamic_codes, nf4_linear

SHAPES = [(64, 128), (24, 160), (300, 576), (7, 64)]  # blocks that end with rows and that do not, groups full and not


def matrix(rows, columns, dtype=torch.float32):
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return (drawn * torch.linspace(0.01, 3, rows)[:, None]).to(dtype)


def quantised(weight, start=0, stop=None):
    rows, columns = weight.shape
    packed = torch.empty((stop or rows) - start, columns // 2, dtype=torch.uint8)
    nf4 = NF4(rows, columns)
    nf4.quantise(packed, start, lambda first, last: weight[first:last])
    return packed, nf4


def naive(weight):
    """(codes of numbers, widths of blocks) in NumPy, number by number, from the definition."""
    table, eight = np.array(CODES, dtype=np.float32), dynamic_codes().numpy()
    blocks = weight.float().numpy().reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(axis=1)
    codes = [np.abs(table - number / width).argmin() for block, width in zip(blocks, absmax, strict=True)
             for number in block]
    mean, widths = absmax.mean(), []
    for start in range(0, len(absmax), GROUP):
        group = absmax[start : start + GROUP] - mean
        largest = np.abs(group).max()
        widths += [eight[np.abs(eight - number / largest).argmin()] * largest + mean for number in group]
    return np.array(codes), np.array(widths)


def test_the_codes_are_the_quantiles_of_a_normal_distribution():
    """Appendix E of the paper: 8 even quantiles below zero and 9 above, zero in both, scaled to [-1, 1]."""
    def quantiles(count):
        return torch.special.ndtri(torch.linspace(0.9677083, 0.5, count, dtype=torch.float64))[:-1]
    found = torch.cat((-quantiles(8), torch.zeros(1, dtype=torch.float64), quantiles(9))).sort().values
    torch.testing.assert_close(torch.tensor(CODES, dtype=torch.float64), found / found.max(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_values_are_those_of_the_definition(shape):
    weight = matrix(*shape)
    packed, nf4 = quantised(weight)
    codes, widths = naive(weight)
    nibbles = np.stack((packed.numpy() >> 4, packed.numpy() & 15), axis=-1).flatten()
    assert (nibbles != codes).mean() < 1e-4  # of two codes that are as near, rounding decides
    found = dequantise(packed, nf4.statistics(), torch.float32)
    expected = np.array(CODES)[nibbles].reshape(-1, BLOCK) * widths[:, None]
    np.testing.assert_allclose(found.numpy().reshape(-1, BLOCK), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_values_are_those_of_bitsandbytes(shape, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    weight = matrix(*shape, dtype)
    # As rows of 64: the CPU's kernel of 0.50 does not undo what its own quantisation did to rows of 160.
    bytes_, state = theirs.quantize_4bit(weight.view(-1, 64), blocksize=64, compress_statistics=True, quant_type="nf4")
    packed, nf4 = quantised(weight)
    assert torch.equal(packed.flatten(), bytes_.flatten())
    steps = nf4.absmax.int() - state.absmax.flatten().int()
    assert steps.abs().max() <= 1  # it takes the second nearest where that is almost as near ...
    assert (steps != 0).float().mean() < 2e-3
    same = (steps == 0).repeat_interleave(64).view(shape)
    torch.testing.assert_close(nf4.steps, state.state2.code, rtol=1e-6, atol=0)
    torch.testing.assert_close(nf4.mean, state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(nf4.scales, state.state2.absmax, rtol=1e-6, atol=0)
    found = dequantise(packed, nf4.statistics(), dtype)
    expected = theirs.dequantize_4bit(bytes_, state).view(shape)
    torch.testing.assert_close(found[same], expected[same], rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-7)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(weight.abs().max()))  # ... and no more


def test_a_number_takes_4_127_bits():
    packed, nf4 = quantised(matrix(1024, 1024))
    whole = packed.nbytes + nf4.absmax.nbytes + nf4.scales.nbytes
    assert whole * 8 / 1024**2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_rows_read_by_parts_are_those_of_the_whole(monkeypatch, shape, ranks):
    """Each rank quantises its rows, whose blocks may begin in another's; the statistics meet in one maximum."""
    weight = matrix(*shape)
    whole, expected = quantised(weight)
    each = -(-shape[0] // ranks)
    bounds = [(min(i * each, shape[0]), min((i + 1) * each, shape[0])) for i in range(ranks)]
    found = torch.zeros(len(expected.absmax))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for last in (False, True):  # the first time the maxima come together, the second time every rank has them
        def together(absmax, op, last=last):
            torch.maximum(found, absmax, out=found)
            absmax.copy_(found)
        monkeypatch.setattr("torch.distributed.all_reduce", together)
        parts = [quantised(weight, start, stop) if stop > start else quantised(weight, start, start) if start else None
                 for start, stop in bounds]
    assert torch.equal(torch.cat([packed[: stop - start] for (packed, _), (start, stop)
                                  in zip(parts, bounds, strict=True)]), whole)
    for _, nf4 in parts:
        for a, b in zip(nf4.statistics(), expected.statistics(), strict=True):
            assert torch.equal(a, b)


def test_nothing_but_zeros():
    packed, nf4 = quantised(torch.zeros(4, 64))
    assert not dequantise(packed, nf4.statistics(), torch.float32).any()


def test_its_product_and_gradient_are_those_of_the_dequantised_matrix():
    packed, nf4 = quantised(matrix(24, 160))
    dense = dequantise(packed, nf4.statistics(), torch.float32)
    x = torch.randn(5, 160, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grad = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    found, = torch.autograd.grad(nf4_linear(x, packed, nf4), x, grad)
    torch.testing.assert_close(nf4_linear(x, packed, nf4), x @ dense.T)
    torch.testing.assert_close(found, grad @ dense)
    low = nf4_linear(x.bfloat16(), packed, nf4)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), x.bfloat16().float() @ dense.bfloat16().float().T, rtol=1e-2, atol=1e-2)
