"""The loss of each target by itself, over a large vocabulary, without ever holding (T, V).

`cross_entropy` makes its gradients in forward, which it can because the losses are summed with weights that are known:
all 1. Here what a loss weighs is known in backward alone, so a chunk's logits are computed there once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambatrain.ops.cross_entropy import CHUNK, IGNORED, SoftmaxLoss, add_product, plain_softmax_loss
from mambatrain.ops.reference import computing_dtype
from mambatrain.ops.shapes import check_cross_entropy


def chunked_token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, softmax_loss: SoftmaxLoss | None = None
) -> Tensor:
    """-log softmax(hidden weight^T)[target] of each target; differentiable once.

    Matrix products run in autocast's dtype where autocast is on, else in fp32 (fp64 for fp64); the rest in fp32 (fp64).

    Args:
        hidden: (T, D).
        weight: (V, D).
        targets: (T,) int64; -100 where a position does not count.
        softmax_loss: a backend's; None: PyTorch's.

    Returns:
        (T,) in nats, fp32 (fp64 for fp64); 0 where a position does not count, and its gradient is exactly 0.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device; nothing was computed.
    """
    check_cross_entropy(hidden, weight, targets)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else computing_dtype(hidden)
    losses: Tensor = _ChunkedTokenLosses.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, dtype, softmax_loss or plain_softmax_loss
    )
    return losses


class _ChunkedTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, softmax_loss: SoftmaxLoss
    ) -> Tensor:
        ctx.dtype, ctx.softmax_loss = dtype, softmax_loss
        counted = (targets != IGNORED).nonzero().squeeze(1)  # the others are left out: nothing of theirs is computed
        losses = torch.zeros_like(targets, dtype=computing_dtype(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for positions in torch.split(counted, CHUNK):
                logits = hidden[positions].to(dtype) @ matrix.T
                losses[positions] = softmax_loss(logits, targets[positions], False)[0]
        ctx.save_for_backward(hidden, weight, targets, counted)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, counted = ctx.saved_tensors
        exact = computing_dtype(hidden)
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        dhidden = torch.zeros_like(hidden, dtype=exact) if for_hidden else None
        dweight = torch.zeros_like(weight, dtype=exact) if for_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(ctx.dtype)
            for positions in torch.split(counted, CHUNK):
                h = hidden[positions].to(ctx.dtype)
                _, dlogits = ctx.softmax_loss(h @ matrix.T, targets[positions], True)
                dlogits = dlogits * grad_losses[positions, None].to(dlogits.dtype)
                if dhidden is not None:
                    dhidden[positions] = (dlogits @ matrix).to(exact)
                if dweight is not None:
                    add_product(dweight, dlogits.T, h)
        return (
            None if dhidden is None else dhidden.to(hidden.dtype),
            None if dweight is None else dweight.to(weight.dtype),
            None,
            None,
            None,
        )
