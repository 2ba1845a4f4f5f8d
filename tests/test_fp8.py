"""FP8 products against NumPy with a table of all 256 numbers of each format, and what FP8 must leave alone."""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from small_runs import final_weights, train
from test_compiled_gradients import CONFIG, Drawn, gradients_of
from test_compiled_gradients import world as world  # a fixture
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minisft import fp8
from minisft.config import Config, LoraConfig, ParallelConfig, TrainConfig
from minisft.errors import UserError
from minisft.lora import adapters as lora
from minisft.model import llama
from minisft.model.llama import Llama

MULTIPLY = {"tensor": fp8.by_tensor, "row": fp8.by_row}


def numbers(exponent_bits, mantissa_bits, bias, largest):
    """Every finite number of a format, from its definition: (-1)^s 2^(e - bias) (1 + m / 2^bits), or subnormal."""
    found = []
    for e in range(2**exponent_bits):
        for m in range(2**mantissa_bits):
            part = m / 2**mantissa_bits
            found.append(2.0 ** (1 - bias) * part if e == 0 else 2.0 ** (e - bias) * (1 + part))
    return np.array([x for x in found if x <= largest])


E4M3, E5M2 = numbers(4, 3, 7, 448), numbers(5, 2, 15, 57344)


def rounded(x, table):
    """To the nearest number of the table, ties to the even one (the tables alternate even and odd)."""
    x = np.asarray(x, dtype=np.float64)
    above = np.searchsorted(table, abs(x)).clip(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    to_high = (abs(x) - low > high - abs(x)) | ((abs(x) - low == high - abs(x)) & (above % 2 == 0))
    return np.sign(x) * np.where(to_high, high, low)


def quantised(x, table, axes):
    scale = (abs(x).max(axes, keepdims=True).astype(np.float32) / np.float32(table[-1])).astype(np.float32)
    return rounded((x.astype(np.float32) / scale).astype(np.float32), table), scale.astype(np.float64)


def multiplied(a, b, tables, axes):
    (a, a_scale), (b, b_scale) = (quantised(x, table, axes) for x, table in zip((a, b), tables, strict=True))
    return (a @ b.T) * a_scale * b_scale.T


@pytest.mark.parametrize("scale", MULTIPLY)
def test_the_three_products_are_the_definition(scale):
    torch.manual_seed(0)
    x, w, grad = (torch.randn(shape).bfloat16() for shape in ((50, 32), (48, 32), (50, 48)))
    x[7] *= 300  # an outlier
    x, w = x.requires_grad_(), w.requires_grad_()
    y = MULTIPLY[scale](x, w)
    found = [y, *torch.autograd.grad(y, (x, w), grad)]
    axes = 1 if scale == "row" else (0, 1)
    a, b, g = (t.detach().float().numpy() for t in (x, w, grad))
    expected = [multiplied(a, b, (E4M3, E4M3), axes), multiplied(g, b.T, (E5M2, E4M3), axes),
                multiplied(g.T, a.T, (E5M2, E4M3), axes)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.detach().double() - torch.tensor(theirs)).norm() <= 0.003 * np.linalg.norm(theirs)


def test_rows_of_their_own_scale_lose_less_beside_an_outlier():
    torch.manual_seed(0)
    x, w = torch.randn(64, 64), torch.randn(32, 64)
    x[0] *= 1e6
    exact = x[1:] @ w.T
    errors = {name: float((multiply(x, w)[1:] - exact).norm() / exact.norm()) for name, multiply in MULTIPLY.items()}
    assert errors["row"] < 0.05 < 0.5 < errors["tensor"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_hidden(bad):
    x, w = torch.ones(16, 16), torch.ones(16, 16)
    x[3, 4] = bad
    for multiply in MULTIPLY.values():
        assert not multiply(x, w)[3].isfinite().any()


class Small(Drawn):
    """Weights so small that rounding one changes the others little."""

    def read(self, name, start, stop):
        return super().read(name, start, stop) * (1 if name.endswith("norm.weight") else 0.25)


def gradients(world, *, scale="tensor", recompute="none", compiled=False, sharded=False, precision="fp8",
              adapters=None):
    return gradients_of(Config(
        train=TrainConfig(precision=precision, fp8_scale=scale), lora=adapters or LoraConfig(),
        parallel=ParallelConfig(
            activation_checkpointing=recompute, compile="true" if compiled else "false")), world, Small(CONFIG),
        sharded=sharded)


def distance(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


@pytest.mark.parametrize("scale", ["tensor", pytest.param("row", marks=pytest.mark.slow)])
def test_a_network_is_near_bf16_and_its_settings_agree(world, monkeypatch, scale):
    bf16, plain = gradients(world, precision="bf16"), gradients(world, scale=scale)
    assert 0.005 < distance(plain, bf16) < 0.2
    for recompute in ("selective", "full"):
        assert distance(gradients(world, scale=scale, recompute=recompute), plain) == 0
    # FSDP gathers the weights in the bf16 that a lone process converts to.
    assert distance(gradients(world, scale=scale, sharded=True), plain) < 0.005
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    for recompute in ("none", "selective"):
        torch._dynamo.reset()
        assert distance(gradients(world, scale=scale, compiled=True, recompute=recompute), plain) < 0.02


def test_selective_recomputation_keeps_five_products(world):
    """`up`, in each of two blocks, and `down`, which is done before torch sees that nothing needs it."""
    counts = {}
    for recompute in ("none", "selective", "full"):
        with Products() as counted:
            gradients(world, recompute=recompute)
        counts[recompute] = counted.shapes
    again = {name: sum((counts[name] - counts["none"]).values()) for name in ("selective", "full")}
    assert set(counts["none"]) >= {(64, 96), (96, 64)}
    assert again == {"selective": 4, "full": 14}


class Products(TorchDispatchMode):
    """Counts products of matrices by the shape of the second."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.mm.default:
            self.shapes[tuple(args[1].shape)] += 1
        return operation(*args, **(kwargs or {}))


def test_adapters_stay_in_bf16_over_an_fp8_base(world, monkeypatch):
    thin = []
    real = llama.linear
    monkeypatch.setattr(lora, "linear", lambda x, w: (thin.append(min(w.shape)), real(x, w))[1])
    settings = LoraConfig(rank=4)
    found, expected = (gradients(world, precision=precision, adapters=settings) for precision in ("fp8", "bf16"))
    assert set(thin) == {4}
    assert 0.005 < distance(found, expected) < 0.2


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a CUDA build of torch")
@pytest.mark.parametrize("dim", [1, (0, 1)])
def test_a_gpu_accepts_the_operands(dim):
    """Layouts, scales and sizes, as torch itself checks them without a GPU; also tokens that are no multiple of 16."""
    turned = dim if isinstance(dim, tuple) else 0
    for tokens in (64, 37):
        with FakeTensorMode(), torch.no_grad():
            x, w, grad = (torch.empty(shape, device="cuda", dtype=torch.bfloat16)
                          for shape in ((tokens, 32), (48, 32), (tokens, 48)))
            x8, w8, g8 = (fp8.quantise(t, dtype, dim) for t, dtype in ((x, fp8.E4M3), (w, fp8.E4M3), (grad, fp8.E5M2)))
            xt, wt, gt = ([part.T for part in fp8.quantise(t, dtype, turned)]
                          for t, dtype in ((x, fp8.E4M3), (w, fp8.E4M3), (grad, fp8.E5M2)))
            for a, b, shape in ((x8, w8, (tokens, 48)), (g8, wt, x.shape), (gt, xt, w.shape)):
                y = fp8.product(a, b, torch.bfloat16)
                assert (y.shape, y.dtype, y.device.type) == (shape, torch.bfloat16, "cuda")


def test_a_whole_run_learns_as_in_bf16_and_exports_bf16(base, tmp_path):
    runs = {precision: train(base, tmp_path / precision, train__precision=precision) for precision in ("bf16", "fp8")}
    first, last = ([runs[precision][i]["loss"] for precision in ("bf16", "fp8")] for i in (0, -1))
    assert first[1] == pytest.approx(first[0], rel=0.02)
    assert last[1] == pytest.approx(last[0], rel=0.05)
    assert last[1] < first[1]
    assert last[0] != last[1]
    assert {tensor.dtype for tensor in final_weights(tmp_path / "fp8").values()} == {torch.bfloat16}


def test_what_cannot_be_multiplied_is_refused(monkeypatch):
    with torch.device("meta"):
        model = Llama(replace(CONFIG, intermediate_size=100))
    with pytest.raises(UserError, match=r"train.precision = fp8: model.layers.0.mlp.gate_proj is 100 x 64, and FP8 "
                                        r"products take multiples of 16; set it to bf16"):
        fp8.use(model, "tensor")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(UserError, match=r"A100 has compute capability 8.0, FP8 needs 8.9"):
        fp8.use(model, "tensor")
