"""The loss: how surprised the model is by the tokens it should have said.

`masked_cross_entropy` is the plain definition. Training uses `linear_cross_entropy`: the same value (if `denominator`
is the number of targets) and the same gradients, but with the head's matrix product inside, so that it can work on a
thousand tokens at a time. Logits for all T tokens never exist: at 8,192 tokens and Llama-3's 128,256 words they
would take 4.2 GB in fp32, and their gradient as much again. The gradients are computed together with the loss, while a
chunk's logits are at hand, so nothing is computed twice and nothing large waits for the backward pass.

Losses are sums, divided once by the trained tokens of the whole step. A mean of means over micro-batches or ranks would
weigh a token by how few others happen to share its micro-batch. If the data gives tokens weights w, the loss of a step
is the sum of w times each token's loss, divided once by the sum of the w of the whole step.
"""

# N trained tokens, D model width, V vocabulary, whose entries are called words

from collections.abc import Callable, Iterable
from functools import cache
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from minisft.config import OptimConfig
from minisft.data.batches import MicroBatch
from minisft.model.llama import Documents, cast, product_dtype

CHUNK = 2**27  # logits at one time: 1,024 tokens with Llama-3's vocabulary, 263 MB in bf16
TILE = 128  # tokens: a chunk is a multiple of it, or the last tiles of a product would leave part of a GPU idle
CPU_SOFTMAX, SOFTMAX = 2**19, 2**25  # logits per softmax: few enough for a core's cache, enough to keep a GPU busy


def masked_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean of -log p(target) over the targets that are not `ignore_index`; 0 and differentiable if there are none.

    logits (..., V), targets (...) -> scalar in fp32, in nats. Targets are already shifted: logits[i] is for targets[i].
    """
    kept = targets != ignore_index
    logits, targets = logits[kept].float(), targets[kept]
    losses = logits.logsumexp(dim=-1) - logits.gather(-1, targets[:, None]).squeeze(-1)
    return losses.sum() / max(len(targets), 1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, denominator: float,
                         target_weights: Tensor | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0,
                         compiled: bool = False) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T` against `targets`, divided by `denominator`.

    hidden (N, D), weight (V, D), targets (N,) -> scalar in fp32. With N = 0, the loss and its gradients are 0.
    `target_weights` (N,) multiply each target's loss, with all its terms; None: all 1.
    `label_smoothing` spreads that much of the target over all words (Szegedy et al. 2016, section 7); `z_loss` times
    the squared log-partition keeps the logits small (Chowdhery et al. 2022, "PaLM", section 5). `compiled` fuses the
    softmax with its gradient, which then reads the logits twice and writes them once: 6 bytes per logit instead of 60.
    """
    if not torch.is_grad_enabled():  # a trained weight would ask for its gradient even so
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, denominator, target_weights, label_smoothing, z_loss,
                                     compiled)


def batch_loss(model: nn.Module, batch: MicroBatch, device: torch.device, denominator: float,
               optim: OptimConfig = OptimConfig(), *, compiled: bool = False) -> Tensor:
    """`linear_cross_entropy` of `model` on a micro-batch in host memory; copying it does not wait for the device."""
    there = batch.to(device)
    documents = Documents(offsets=batch.cu_seqlens, cu_seqlens=there.cu_seqlens, positions=there.positions,
                          longest=batch.longest, ids=there.document_ids, ranks=batch.ranks)
    return model(there.tokens, documents, lambda hidden, head: linear_cross_entropy(
        hidden[there.target_at], head, there.targets, denominator=denominator, target_weights=there.target_weights,
        label_smoothing=optim.label_smoothing, z_loss=optim.z_loss, compiled=compiled))


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the tokens.

    With p = softmax(logits), lse = logsumexp(logits), y the smoothed target, the gradient with respect to the logits is
    p - y + 2 z lse p.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, denominator: float,
                target_weights: Tensor | None, label_smoothing: float, z_loss: float, compiled: bool) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        dtype = product_dtype(hidden)
        matrix = cast(cast(weight, hidden.dtype), dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        if target_weights is None:
            scale = torch.full_like(total, 1 / denominator)  # filled on the device: the host does not wait
        else:  # divided in fp64: weights may be larger than fp32 holds
            scale = (target_weights[:, None] / denominator).float()  # (N, 1)
        chunk = chunk_tokens(len(weight))
        # In fp32, because bf16 sums over words and chunks would lose small gradients. A single chunk is no sum.
        sum_dtype = weight.dtype if len(targets) <= chunk else torch.float32
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.empty(weight.shape, dtype=sum_dtype, device=weight.device) if needs_weight else None
        # On a CPU a few rows stay in cache from one pass to the next, as do sums over a few words between two products.
        # A GPU sums a product over all words in fp32 by itself.
        logits_at_once, words_at_once = (CPU_SOFTMAX, 1024) if hidden.is_cpu else (SOFTMAX, len(weight))
        rows_at_once = max(logits_at_once // len(weight), 1)
        buffer = torch.empty(min(chunk, len(targets)), len(weight), dtype=dtype, device=hidden.device)
        grads = grad_hidden.split(chunk) if grad_hidden is not None else repeat(None)
        for i, (x, target, grad_x, scale_x) in enumerate(zip(hidden.split(chunk), targets.split(chunk), grads,
                                                             _split(scale, chunk), strict=False)):
            x = x.to(dtype)
            logits = torch.mm(x, matrix.T, out=buffer[: len(x)])  # (n, V), then its own gradient
            if compiled:
                logits, loss = _compiled_gradient(logits, target[:, None], scale_x, label_smoothing, z_loss)
                total += loss
            else:
                for rows, at, scale_rows in zip(logits.split(rows_at_once), target[:, None].split(rows_at_once),
                                                _split(scale_x, rows_at_once), strict=False):
                    gradient, at_target, loss = _gradient(rows, at, scale_rows, label_smoothing, z_loss)
                    rows.copy_(gradient).scatter_(-1, at, at_target)
                    total += loss
            # A single product may be rounded at once; a sum of several is rounded when it is complete.
            in_fp32 = grad_x is not None and (words_at_once < len(weight) or grad_x.dtype != dtype)
            sum_x = torch.empty(x.shape, dtype=torch.float32, device=x.device) if in_fp32 else grad_x
            for start in range(0, len(weight), words_at_once):
                words = slice(start, start + words_at_once)
                if sum_x is not None:
                    _add_product(sum_x, logits[:, words], matrix[words], begins=start == 0)
                if grad_weight is not None:
                    _add_product(grad_weight[words], logits[:, words].T, x, begins=i == 0)
            if grad_x is not None and in_fp32:
                grad_x.copy_(sum_x)
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None  # or they would live as long as the loss
        for gradient in (grad_hidden, grad_weight):
            if gradient is not None:
                gradient *= grad_loss.to(gradient.dtype)
        return grad_hidden, grad_weight, *[None] * 6


def _add_product(sums: Tensor, left: Tensor, right: Tensor, *, begins: bool) -> None:
    """sums += left @ right, or = if it `begins`; left and right may be narrower than the sums."""
    if left.dtype == sums.dtype:
        sums.addmm_(left, right, beta=0 if begins else 1)
    elif sums.is_cuda:  # summed inside the product, without a copy of it
        torch.addmm(sums, left, right, out_dtype=sums.dtype, beta=0 if begins else 1, out=sums)
    elif begins:
        sums.copy_(left @ right)
    else:
        sums += left @ right


def _split(scale: Tensor, rows: int) -> Iterable[Tensor]:
    """The parts of a scale (N, 1), each of `rows` rows; a scale () goes with every part."""
    return scale.split(rows) if scale.dim() else repeat(scale)


def chunk_tokens(vocabulary: int) -> int:
    """The number of trained tokens whose logits exist at one time."""
    tokens = max(CHUNK // vocabulary, 1)
    return tokens // TILE * TILE or tokens


def _gradient(logits: Tensor, target: Tensor, scale: Tensor, label_smoothing: float,
              z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """logits (n, V), target (n, 1), scale () or (n, 1) -> gradient (n, V), its values at the targets (n, 1), loss ().

    The loss is the sum of each token's loss times its scale, and the gradient that sum's with respect to the logits, as
    if no word were the target: the values at the targets come separately, so that the compiler can fuse the rest into
    one pass. No argument is changed: torch 2.11 fuses a gather from a tensor with the write to that tensor, and reads
    what was written.
    """
    log_p = logits.float().log_softmax(dim=-1)
    target_log_p = log_p.gather(-1, target)
    loss = -(1 - label_smoothing) * target_log_p
    if label_smoothing:
        loss = loss - label_smoothing * log_p.mean(dim=-1, keepdim=True)
    of_p = scale  # the factor of p
    if z_loss:
        lse = logits.gather(-1, target) - target_log_p
        loss, of_p = loss + z_loss * lse**2, scale * (1 + 2 * z_loss * lse)
    gradient, at_target = log_p.exp_().mul_(of_p), target_log_p.exp() * of_p - (1 - label_smoothing) * scale
    if label_smoothing:
        everywhere = scale * (label_smoothing / logits.shape[1])
        gradient, at_target = gradient.sub_(everywhere), at_target - everywhere
    return gradient.to(logits.dtype), at_target.to(logits.dtype), (loss * scale).sum()


def _compiled_gradient(logits: Tensor, target: Tensor, scale: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """The complete gradient, and the loss. The logits are read twice, the gradient is written once."""
    for tensor in (logits, target, scale) if scale.dim() else (logits, target):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)  # or a step's last, shorter chunk would be compiled anew
    gradient, at_target, loss = _compiler()(logits, target, scale, *settings)
    return gradient.scatter_(-1, target, at_target), loss


@cache
def _compiler() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_gradient, fullgraph=True)
