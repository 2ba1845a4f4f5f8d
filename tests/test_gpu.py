"""What a GPU computes is what the CPU computes, with the real kernels. Skipped without a GPU."""

import pytest
import torch
from small_runs import train
from test_cuda_paths import TINY

from minisft.config import OptimConfig
from minisft.generate.decoding import logits
from minisft.lean.adamw import LeanAdamW
from minisft.model.llama import Documents, Llama, attend
from minisft.training.loss import linear_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ("cpu", "cuda")


@pytest.mark.parametrize("lengths", [(7, 1, 30, 26), (1,) * 64, (4096,), (1000, 24, 3072)])
@pytest.mark.parametrize(("shared", "width"), [(1, 64), (4, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("views", [False, True])  # of one buffer, as ranks that share a stream receive it
def test_attention(lengths, shared, width, dtype, views):
    torch.manual_seed(0)
    sizes = (8, 8 // shared, 8 // shared)
    qkv = [torch.randn(sum(lengths), heads, width).to(dtype) for heads in sizes]
    grad, found = torch.randn(sum(lengths), 8, width).to(dtype), []
    for device in DEVICES:
        x = [tensor.to(device, copy=True).requires_grad_() for tensor in qkv]
        x = torch.cat(x, dim=1).split(sizes, dim=1) if views else x
        out = attend(*x, Documents.of_lengths(lengths, device=device))
        found.append([t.float().cpu() for t in (out, *torch.autograd.grad(out, x, grad.to(device)))])
    near = 0.03 if dtype == torch.bfloat16 else 1e-3
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=near, atol=near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("extras", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}])
def test_loss(dtype, extras, weighted):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(3000, 64), torch.randn(50_000, 64) * 0.1, torch.randint(50_000, (3000,))
    weights = torch.rand(3000).double() if weighted else None
    found = []
    for device in DEVICES:
        h, w = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
        loss = linear_cross_entropy(h, w, targets.to(device), denominator=3000, **extras,
                                    target_weights=weights.to(device) if weighted else None)
        found.append([t.detach().float().cpu() for t in (loss, *torch.autograd.grad(loss, (h, w)))])
    for cpu, gpu in zip(*found, strict=True):
        scale = float(cpu.abs().max())
        torch.testing.assert_close(gpu, cpu, rtol=0, atol=scale * (0.02 if dtype == torch.bfloat16 else 1e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7])
def test_logits_are_never_rounded_to_bf16(dtype, rows):
    torch.manual_seed(0)
    x, head = torch.randn(rows, 2048).to(dtype), (torch.randn(50_001, 2048) * 0.02).to(dtype)
    truth = x.double() @ head.double().T
    found = logits(x.cuda(), head.cuda())
    assert found.dtype == torch.float32
    assert (found.cpu() - truth).abs().max() < 1e-4 * truth.abs().max()


@pytest.mark.parametrize("savers", [{}, {"moments": "bf16"}])
def test_moments_that_visit_from_the_host_change_nothing(savers):
    """Three streams that race would give other weights."""
    found = []
    for offload in (False, True):
        torch.manual_seed(0)
        model = Llama(TINY).cuda()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        optimizer = LeanAdamW(model, OptimConfig(**savers), offload=offload)
        for step in range(5):
            optimizer.begin(1e-3, step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.clip(1.0)
            optimizer.step()
        found.append({name: parameter.detach().cpu() for name, parameter in model.named_parameters()})
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("change", [
    {"parallel__compile": "false"}, {"parallel__activation_checkpointing": "selective"},
    {"parallel__activation_checkpointing": "full"}, {"parallel__offload": "parameters"},
    {"lora__rank": 4, "lora__dropout": 0.0},
])
def test_a_run_learns_and_ends(base, tmp_path, change):
    losses = [record["loss"] for record in train(base, tmp_path, train__precision="bf16", **change)]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run/final/model.safetensors").exists()


def test_runs_that_should_be_the_same_nearly_are(base, tmp_path):
    found = [train(base, tmp_path / str(i), train__precision="bf16", **change) for i, change in enumerate((
        {"parallel__compile": "false"}, {}, {"parallel__activation_checkpointing": "selective"}))]
    for records in found[1:]:
        assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in found[0]], rel=0.01)
