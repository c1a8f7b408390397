"""Root-mean-square norms, computed in fp32 (fp64 for fp64) under every precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambatrain.ops.reference import computing_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    Args:
        x: (..., D); the residual stream comes in fp32.
        weight: (D,).
        eps: added to the mean of squares.

    Returns:
        (..., D) in the dtype of x.
    """
    dtype = computing_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x.to(dtype), (x.shape[-1],), weight.to(dtype), eps).to(x.dtype)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int = 1) -> Tensor:
    """Mamba-2's norm behind the scan: rms_norm(y * silu(z)) in groups of D / num_groups channels.

    Args:
        y: (..., D), the output of the scan.
        z: (..., D), the gate.
        weight: (D,).
        eps: added to the mean of squares of each group.
        num_groups: D is a multiple of it.

    Returns:
        (..., D) in the dtype of y.
    """
    dtype = computing_dtype(y)
    with torch.autocast(y.device.type, enabled=False):
        gated = y.to(dtype) * F.silu(z.to(dtype))
        groups = torch.unflatten(gated, -1, (num_groups, -1))
        normed = F.rms_norm(groups, (groups.shape[-1],), None, eps).flatten(-2)
        return (normed * weight.to(dtype)).to(y.dtype)
