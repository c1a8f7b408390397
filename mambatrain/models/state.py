"""What a block remembers between two calls."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockState(NamedTuple):
    """The recurrent state of one block, of the same size after one token and after a million."""

    window: Tensor
    """(B, W - 1, D): the last inputs of the convolution, oldest first; 0 before the last boundary."""
    ssm: Tensor
    """(B, E, N) for Mamba-1, (B, H, P, N) for Mamba-2; fp32 (fp64 in an fp64 model)."""
