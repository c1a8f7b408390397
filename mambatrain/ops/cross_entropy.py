"""Cross-entropy over a large vocabulary that never holds (T, V).

Positions are taken in chunks, and where a gradient is wanted it is made while the chunk's logits are there: backward
only scales. The matrix products are those of the plain form, so the time is too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambatrain.ops.reference import computing_dtype
from mambatrain.ops.shapes import check_cross_entropy

CHUNK = 256  # positions
IGNORED = -100


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(hidden weight^T)[target] over the targets that count; differentiable once.

    Matrix products run in autocast's dtype where autocast is on, else in fp32 (fp64 for fp64); the rest in fp32 (fp64).

    Args:
        hidden: (T, D).
        weight: (V, D).
        targets: (T,) int64; -100 where a position does not count: its gradient is exactly 0.

    Returns:
        The summed loss in nats, a scalar in fp32 (fp64 for fp64).

    Raises:
        ValueError: an argument has a wrong shape, dtype or device; nothing was computed.
    """
    check_cross_entropy(hidden, weight, targets)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else computing_dtype(hidden)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, dtype, *wanted)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        for_hidden: bool,
        for_weight: bool,
    ) -> Tensor:
        exact = computing_dtype(hidden)
        ctx.dtypes = hidden.dtype, weight.dtype
        counted = (targets != IGNORED).nonzero().squeeze(1)  # the others are left out: nothing of theirs is computed
        dhidden = torch.zeros_like(hidden, dtype=exact) if for_hidden else None
        dweight = torch.zeros_like(weight, dtype=exact) if for_weight else None
        loss = hidden.new_zeros((), dtype=torch.float64)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for positions in torch.split(counted, CHUNK):
                h = hidden[positions].to(dtype)
                losses, dlogits = _softmax_loss((h @ matrix.T).to(exact), targets[positions])
                loss += losses.sum(dtype=torch.float64)
                dlogits = dlogits.to(dtype)
                if dhidden is not None:
                    dhidden[positions] = (dlogits @ matrix).to(exact)
                if dweight is not None:
                    _add_product(dweight, dlogits.T, h)
        ctx.save_for_backward(dhidden, dweight)
        return loss.to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (R,) and their gradients with respect to the logits (R, V), from logits (R, V) and targets (R,)."""
    top, likeliest = logits.max(dim=1, keepdim=True)
    target_logits = logits.gather(1, targets[:, None])
    probabilities = torch.softmax(logits, dim=1)
    # log sum exp = top - log p(top), and p(top) >= 1 / V: no second pass of exponentials, and no small p
    losses = top - probabilities.gather(1, likeliest).log() - target_logits
    one = torch.ones_like(losses).neg_()
    return losses, probabilities.scatter_add_(1, targets[:, None], one)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in one pass where the dtypes allow it."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
