"""Root-mean-square norms as modules: a weight that stays fp32, and the operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambatrain.models.parameters import require_full_precision
from mambatrain.ops.norms import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> the same
        require_full_precision(**{"norm.weight": self.weight})
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """norm(y * silu(z)) in groups of width / num_groups channels: Mamba-2's, the gate before the norm."""

    def __init__(self, width: int, eps: float, num_groups: int) -> None:
        super().__init__()
        self.eps = eps
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:  # (..., width), (..., width) -> the same
        require_full_precision(**{"mixer.norm.weight": self.weight})
        return gated_rms_norm(y, z, self.weight, self.eps, self.num_groups)
