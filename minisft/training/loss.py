"""The loss: how surprised the model is by the tokens it should have said.

`masked_cross_entropy` is the plain definition. `linear_cross_entropy` is what training uses: the same value and the
same gradients, with the head's matrix product inside, so that it can work on a few hundred tokens at a time. Logits
for all T tokens never exist: at 8,192 tokens and Llama-3's 128,256 words they would take 4.2 GB in fp32, and their
gradient as much again. The gradients are computed together with the loss, while a chunk's logits are at hand, so
nothing is computed twice and nothing large waits for the backward pass.

Losses are sums, divided once by the trained tokens of the whole step. A mean of the means of micro-batches or ranks
would weigh a token by how few others happen to share its micro-batch.
"""

# N trained tokens, D model width, V vocabulary

import torch
from torch import Tensor

from minisft.model.precision import is_slow

CHUNK = 512  # tokens whose logits exist at one time: 263 MB in fp32 with Llama-3's vocabulary


def masked_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean of -log p(target) over the targets that are not `ignore_index`; 0, still differentiable, if all are.

    logits (..., V), targets (...) -> scalar in fp32, in nats. Targets are already shifted: logits[i] is for targets[i].
    """
    kept = targets != ignore_index
    logits, targets = logits[kept].float(), targets[kept]
    losses = logits.logsumexp(dim=-1) - logits.gather(-1, targets[:, None]).squeeze(-1)
    return losses.sum() / max(len(targets), 1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, denominator: float,
                         label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T` against `targets`, divided by `denominator`.

    hidden (N, D), weight (V, D), targets (N,) -> scalar in fp32. With N = 0 it is 0 and the gradients are zeros.
    `label_smoothing` spreads that much of the target over all words (Szegedy et al. 2016, section 7); `z_loss` times
    the squared log-partition keeps the logits small (Chowdhery et al. 2022, "PaLM", section 5).
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, denominator, label_smoothing, z_loss)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the tokens.

    With p = softmax(logits), lse = logsumexp(logits), y the smoothed target, the gradient by the logits is
    p - y + 2 z lse p.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, denominator, label_smoothing, z_loss):
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        dtype = torch.float32 if is_slow(weight) else weight.dtype
        matrix = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        for start in range(0, len(targets), CHUNK):
            rows = slice(start, start + CHUNK)
            x, target = hidden[rows].to(dtype), targets[rows, None]
            logits = (x @ matrix.T).float()  # (chunk, V), reused in place for its own gradient
            lse = logits.logsumexp(dim=-1, keepdim=True)
            loss = lse - (1 - label_smoothing) * logits.gather(-1, target)
            if label_smoothing:
                loss = loss - label_smoothing * logits.mean(dim=-1, keepdim=True)
            if z_loss:
                loss = loss + z_loss * lse**2
            total += loss.sum()
            if needs_hidden or needs_weight:
                grad = logits.sub_(lse).exp_()
                if z_loss:
                    grad *= 1 + 2 * z_loss * lse
                grad.scatter_add_(-1, target, torch.full_like(lse, label_smoothing - 1))
                if label_smoothing:
                    grad -= label_smoothing / len(weight)
                grad = grad.div_(denominator).to(dtype)
                if needs_hidden:
                    grad_hidden[rows] = grad @ matrix
                if needs_weight:
                    # Summed in fp32: bf16 sums over chunks would lose what small gradients add.
                    grad_weight = grad_weight.addmm_(grad.T, x) if dtype == torch.float32 else grad_weight + grad.T @ x
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        return total / denominator

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = (None if g is None else g * grad_loss.to(g.dtype) for g in ctx.gradients)
        return grad_hidden, grad_weight, None, None, None, None
