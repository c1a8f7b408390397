"""Root-mean-square norms, computed in fp32 (fp64 for fp64) under every precision.

One autograd Function serves both: it keeps its inputs and one number a norm, and takes half the time of autograd
through torch's own rms_norm, which has no fused form on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mambatrain.ops.reference import computing_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467); differentiable once.

    Args:
        x: (..., D); the residual stream comes in fp32.
        weight: (D,).
        eps: added to the mean of squares.

    Returns:
        (..., D) in the dtype of x.
    """
    y: Tensor = _RMSNorm.apply(x, None, weight, eps, 1)  # type: ignore[no-untyped-call]
    return y


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int = 1) -> Tensor:
    """Mamba-2's norm behind the scan: y * silu(z), normed in groups of D / num_groups channels; differentiable once.

    Args:
        y: (..., D), the output of the scan.
        z: (..., D), the gate.
        weight: (D,).
        eps: added to the mean of squares of each group.
        num_groups: D is a multiple of it.

    Returns:
        (..., D) in the dtype of y.
    """
    normed: Tensor = _RMSNorm.apply(y, z, weight, eps, num_groups)  # type: ignore[no-untyped-call]
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor, eps: float, num_groups: int) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            gated = _gate(x, z, num_groups)  # (..., G, D / G)
            mean_square = torch.linalg.vector_norm(gated, dim=-1, keepdim=True).square_().div_(gated.shape[-1])
            scale = mean_square.add_(eps).rsqrt_()
            ctx.save_for_backward(x, z, weight, scale)
            normed: Tensor = (gated * scale).flatten(-2)
            return normed.mul_(weight.to(scale.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, scale = ctx.saved_tensors
        num_groups = scale.shape[-2]
        with torch.autocast(x.device.type, enabled=False):
            normed = _gate(x, z, num_groups) * scale
            g = torch.unflatten(grad.to(scale.dtype), -1, (num_groups, -1))
            w = weight.to(scale.dtype).view(num_groups, -1)
            per_weight = g * normed
            dweight = per_weight.reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)
            along = torch.linalg.vecdot(per_weight, w)[..., None].div_(-normed.shape[-1])
            dgated = normed.mul_(along).addcmul_(g, w).mul_(scale).flatten(-2)
            if z is None:
                return dgated.to(x.dtype), None, dweight, None, None
            gate = z.to(scale.dtype)
            dz = torch.ops.aten.silu_backward(dgated * x.to(scale.dtype), gate)
            return dgated.mul_(F.silu(gate)).to(x.dtype), dz.to(z.dtype), dweight, None, None


def _gate(x: Tensor, z: Tensor | None, num_groups: int) -> Tensor:
    """x, or x * silu(z), in the computing dtype and in groups (..., G, D / G)."""
    dtype = computing_dtype(x)
    gated = x.to(dtype) if z is None else x.to(dtype) * F.silu(z.to(dtype))
    return torch.unflatten(gated, -1, (num_groups, -1))
