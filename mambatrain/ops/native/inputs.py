"""The tensors that the bindings of every device take, as `ops/reference.py` has them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mambatrain.ops.native.operators import full_precision, readable


class ScanInputs(NamedTuple):
    """What goes into Mamba-1's scan."""

    u: Tensor  # (B, L, E), like dt and z
    dt: Tensor
    A: Tensor  # (E, N)
    B: Tensor  # (B, L, N), like C
    C: Tensor
    D: Tensor | None  # (E,), like dt_bias
    z: Tensor | None
    dt_bias: Tensor | None
    boundaries: Tensor | None  # (B, L)
    initial_state: Tensor | None  # (B, E, N)

    def readable(self) -> ScanInputs:
        """As kernels take them: the last dimension contiguous, parameters and states fp32."""
        u, dt, B, C = (readable(tensor) for tensor in (self.u, self.dt, self.B, self.C))
        z = None if self.z is None else readable(self.z)
        D, dt_bias, initial_state = map(full_precision, (self.D, self.dt_bias, self.initial_state))
        boundaries = None if self.boundaries is None else self.boundaries.contiguous()
        return ScanInputs(u, dt, self.A.float().contiguous(), B, C, D, z, dt_bias, boundaries, initial_state)


class ConvInputs(NamedTuple):
    """What goes into the convolution."""

    x: Tensor  # (B, L, D)
    weight: Tensor  # (D, W)
    bias: Tensor | None  # (D,)
    boundaries: Tensor | None  # (B, L)
    initial_window: Tensor | None  # (B, W - 1, D)

    def readable(self) -> ConvInputs:
        """As kernels take them: the last dimension contiguous, parameters and windows fp32."""
        bias, initial_window = full_precision(self.bias), full_precision(self.initial_window)
        boundaries = None if self.boundaries is None else self.boundaries.contiguous()
        return ConvInputs(readable(self.x), self.weight.float().contiguous(), bias, boundaries, initial_window)
