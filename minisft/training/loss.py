"""The loss: how surprised the model is by the tokens it should have said.

`masked_cross_entropy` is the plain definition. `linear_cross_entropy` is what training uses: the same value, where
`denominator` is the number of targets, and the same gradients, with the head's matrix product inside, so that it can
work on a few hundred tokens at a time. Logits for all T tokens never exist: at 8,192 tokens and Llama-3's 128,256 words
they would take 4.2 GB in fp32, and their gradient as much again. The gradients are computed together with the loss,
while a chunk's logits are at hand, so nothing is computed twice and nothing large waits for the backward pass.

Losses are sums, divided once by the trained tokens of the whole step. A mean of the means of micro-batches or ranks
would weigh a token by how few others happen to share its micro-batch.
"""

# N trained tokens, D model width, V vocabulary, whose entries are called words

from collections.abc import Callable
from functools import cache
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from minisft.data.batches import MicroBatch
from minisft.model.attention import Documents
from minisft.model.precision import operand, product_dtype

CHUNK = 2**27  # logits that exist at one time: those of 1,024 tokens with Llama-3's vocabulary, 263 MB in bf16
TILE = 128  # tokens: a chunk is a multiple of it, or the products' last tiles would keep only part of a GPU busy
CPU_SOFTMAX, SOFTMAX = 2**19, 2**25  # of them in fp32: few enough for a core's cache, enough to keep a GPU busy


def masked_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean of -log p(target) over the targets that are not `ignore_index`; 0, still differentiable, if all are.

    logits (..., V), targets (...) -> scalar in fp32, in nats. Targets are already shifted: logits[i] is for targets[i].
    """
    kept = targets != ignore_index
    logits, targets = logits[kept].float(), targets[kept]
    losses = logits.logsumexp(dim=-1) - logits.gather(-1, targets[:, None]).squeeze(-1)
    return losses.sum() / max(len(targets), 1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, denominator: float,
                         label_smoothing: float = 0.0, z_loss: float = 0.0, compiled: bool = False) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T` against `targets`, divided by `denominator`.

    hidden (N, D), weight (V, D), targets (N,) -> scalar in fp32. With N = 0 it is 0 and the gradients are zeros.
    `label_smoothing` spreads that much of the target over all words (Szegedy et al. 2016, section 7); `z_loss` times
    the squared log-partition keeps the logits small (Chowdhery et al. 2022, "PaLM", section 5). `compiled` fuses the
    softmax and its gradient: the logits are then read twice and written once, 6 bytes a logit instead of about 60.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, denominator, label_smoothing, z_loss, compiled)


def batch_loss(model: nn.Module, batch: MicroBatch, *, device: torch.device, denominator: float,
               label_smoothing: float = 0.0, z_loss: float = 0.0, dropout_key: tuple[int, int] | None = None,
               compiled: bool = False) -> Tensor:
    """The loss above of what `model` makes of a micro-batch on the host; copying it does not wait for the device.

    With `dropout_key` a network with adapters drops as it says; it is another in each step.
    """
    offsets, batch = batch.cu_seqlens, batch.to(device)
    draws = batch.draws(dropout_key) if dropout_key else None
    documents = Documents(offsets, batch.cu_seqlens, batch.positions, batch.longest, draws=draws)
    return model(batch.tokens, documents, lambda hidden, head: linear_cross_entropy(
        hidden[batch.target_at], head, batch.targets, denominator=denominator, label_smoothing=label_smoothing,
        z_loss=z_loss, compiled=compiled))


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the tokens.

    With p = softmax(logits), lse = logsumexp(logits), y the smoothed target, the gradient by the logits is
    p - y + 2 z lse p.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, denominator: float, label_smoothing: float,
                z_loss: float, compiled: bool) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        dtype = product_dtype(hidden)
        matrix = operand(weight, hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        scale = torch.full_like(total, 1 / denominator)  # filled on the device, which nobody waits for
        tokens = chunk_tokens(len(weight))
        # Summed in fp32: bf16 sums over words and chunks would lose what small gradients add. One chunk is no sum.
        sums = weight.dtype if len(targets) <= tokens else torch.float32
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.empty(weight.shape, dtype=sums, device=weight.device) if needs_weight else None
        # On a CPU a few rows stay in its cache from one pass to the next, and sums of a few words between two products.
        # A GPU sums all words of a product in fp32 by itself.
        softmax, words_at_once = (CPU_SOFTMAX, 1024) if hidden.is_cpu else (SOFTMAX, len(weight))
        rows_at_once = max(softmax // len(weight), 1)
        buffer = torch.empty(min(tokens, len(targets)), len(weight), dtype=dtype, device=hidden.device)
        grads = grad_hidden.split(tokens) if grad_hidden is not None else repeat(None)
        for i, (x, target, grad_x) in enumerate(zip(hidden.split(tokens), targets.split(tokens), grads, strict=False)):
            x = x.to(dtype)
            logits = torch.mm(x, matrix.T, out=buffer[: len(x)])  # (n, V), then its own gradient
            if compiled:
                logits, loss = _compiled_gradient(logits, target[:, None], scale, label_smoothing, z_loss)
                total += loss
            else:
                for rows, at in zip(logits.split(rows_at_once), target[:, None].split(rows_at_once), strict=True):
                    gradient, at_target, loss = _gradient(rows, at, scale, label_smoothing, z_loss)
                    rows.copy_(gradient).scatter_(-1, at, at_target)
                    total += loss
            one_product = grad_x is not None and words_at_once == len(weight)
            sum_x = grad_x if grad_x is None or (one_product and grad_x.dtype == dtype) else \
                torch.empty(x.shape, dtype=torch.float32, device=x.device)
            for start in range(0, len(weight), words_at_once):
                words = slice(start, start + words_at_once)
                if sum_x is not None:
                    _add_product(sum_x, logits[:, words], matrix[words], begins=start == 0)
                if grad_weight is not None:
                    _add_product(grad_weight[words], logits[:, words].T, x, begins=i == 0)
            if grad_x is not None and sum_x is not grad_x:
                grad_x.copy_(sum_x)
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        return total / denominator

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None  # they would live as long as the loss
        for gradient in (grad_hidden, grad_weight):
            if gradient is not None:
                gradient *= grad_loss.to(gradient.dtype)
        return grad_hidden, grad_weight, *[None] * 5


def _add_product(sums: Tensor, left: Tensor, right: Tensor, *, begins: bool) -> None:
    """sums += left @ right, or = where the sum begins; left and right may be narrower than the sums."""
    if left.dtype == sums.dtype:
        sums.addmm_(left, right, beta=0 if begins else 1)
    elif sums.is_cuda:  # summed where the product is computed, without a copy of it
        torch.addmm(sums, left, right, out_dtype=sums.dtype, beta=0 if begins else 1, out=sums)
    elif begins:
        sums.copy_(left @ right)
    else:
        sums += left @ right


def chunk_tokens(vocabulary: int) -> int:
    """The trained tokens whose logits exist at one time."""
    tokens = max(CHUNK // vocabulary, 1)
    return tokens // TILE * TILE or tokens


def _gradient(logits: Tensor, target: Tensor, scale: Tensor, label_smoothing: float,
              z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient by logits (n, V) of the losses against `target` (n, 1) times `scale` (), as if no word were the
    target; what it is at the targets (n, 1); and the sum of the losses.

    Apart, because then all of it is one pass that the compiler can fuse. It changes none of its arguments: torch 2.11
    fuses a gather from a tensor with the write to that tensor, and reads what was written.
    """
    log_p = logits.float().log_softmax(dim=-1)
    target_log_p = log_p.gather(-1, target)
    loss = -(1 - label_smoothing) * target_log_p
    if label_smoothing:
        loss = loss - label_smoothing * log_p.mean(dim=-1, keepdim=True)
    of_p = scale  # what p is multiplied by
    if z_loss:
        lse = logits.gather(-1, target) - target_log_p
        loss, of_p = loss + z_loss * lse**2, scale * (1 + 2 * z_loss * lse)
    gradient, at_target = log_p.exp_().mul_(of_p), target_log_p.exp() * of_p - (1 - label_smoothing) * scale
    if label_smoothing:
        everywhere = scale * (label_smoothing / logits.shape[1])
        gradient, at_target = gradient.sub_(everywhere), at_target - everywhere
    return gradient.to(logits.dtype), at_target.to(logits.dtype), loss.sum()


def _compiled_gradient(logits: Tensor, target: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """`_gradient`, complete, and the sum of the losses. The logits are read twice, the gradient is written once."""
    for tensor in (logits, target):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)  # or a step's last, shorter chunk would be compiled anew
    gradient, at_target, loss = _compiler()(logits, target, *settings)
    return gradient.scatter_(-1, target, at_target), loss


@cache
def _compiler() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_gradient, fullgraph=True)
