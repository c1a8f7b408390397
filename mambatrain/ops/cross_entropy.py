"""Cross-entropy over a large vocabulary that never holds (T, V).

Positions are taken in chunks, and where a gradient is wanted it is made while the chunk's logits are there: backward
only scales. The matrix products are those of the plain form, so the time is too.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambatrain.ops.reference import computing_dtype
from mambatrain.ops.shapes import check_cross_entropy

CHUNK = 512  # positions: fewer cost time in the products, more memory
IGNORED = -100


class SoftmaxLoss(Protocol):
    """What is done with the logits of a chunk; backends differ in it."""

    def __call__(self, logits: Tensor, targets: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]: ...


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softmax_loss: SoftmaxLoss | None = None
) -> Tensor:
    """Sum of -log softmax(hidden weight^T)[target] over the targets that count; differentiable once.

    Matrix products run in autocast's dtype where autocast is on, else in fp32 (fp64 for fp64); the rest in fp32 (fp64).

    Args:
        hidden: (T, D).
        weight: (V, D).
        targets: (T,) int64; -100 where a position does not count: its gradient is exactly 0.
        softmax_loss: a backend's; None: PyTorch's.

    Returns:
        The summed loss in nats, a scalar in fp32 (fp64 for fp64).

    Raises:
        ValueError: an argument has a wrong shape, dtype or device; nothing was computed.
    """
    check_cross_entropy(hidden, weight, targets)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else computing_dtype(hidden)
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, dtype, softmax_loss or plain_softmax_loss, *wanted
    )
    return loss


def plain_softmax_loss(logits: Tensor, targets: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """-log softmax(logits)[target] of each row, and its gradient.

    Args:
        logits: (R, V); their memory may be used for the gradients.
        targets: (R,) int64.
        wants_gradient: else the second result is None.

    Returns:
        (R,) in fp32 (fp64 for fp64), and (R, V) in the dtype of the logits.
    """
    dtype, logits = logits.dtype, logits.to(computing_dtype(logits))
    top, likeliest = logits.max(dim=1, keepdim=True)
    target_logits = logits.gather(1, targets[:, None])
    probabilities = torch.softmax(logits, dim=1)
    # log sum exp = top - log p(top), and p(top) >= 1 / V: no second pass of exponentials, and no small p
    losses = top - probabilities.gather(1, likeliest).log() - target_logits
    if not wants_gradient:
        return losses[:, 0], None
    one = torch.ones_like(losses).neg_()
    return losses[:, 0], probabilities.scatter_add_(1, targets[:, None], one).to(dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        softmax_loss: SoftmaxLoss,
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
            buffer = matrix.new_empty(min(CHUNK, len(counted)), len(matrix))
            for positions in torch.split(counted, CHUNK):
                h = hidden[positions].to(dtype)
                logits = torch.mm(h, matrix.T, out=buffer[: len(h)])
                losses, dlogits = softmax_loss(logits, targets[positions], for_hidden or for_weight)
                loss += losses.sum(dtype=torch.float64)
                if dhidden is not None and dlogits is not None:
                    dhidden[positions] = (dlogits @ matrix).to(exact)
                if dweight is not None and dlogits is not None:
                    add_product(dweight, dlogits.T, h)
        ctx.save_for_backward(dhidden, dweight)
        return loss.to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in one pass where the dtypes allow it."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
