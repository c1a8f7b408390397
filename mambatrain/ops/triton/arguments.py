"""The arguments of Mamba-2's scan as its kernels take them, and the sizes of their tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambatrain.ops.triton.kernels.tiles import Heads, Sizes

HEADS_PER_SPLIT = 8  # heads of a group that one program adds up; the sums of the splits are added after
LONGEST_STRIDE = 2**24  # elements from one position to the next; 64 of them are counted in 32 bits
HEADS_PER_PROGRAM = 16  # of the kernels of delta, whose heads lie side by side in memory


@dataclass(frozen=True)
class Tiling:
    """Sizes of tiles, powers of 2 and at least 16 as products of matrices need them."""

    positions: int  # T, half a chunk
    channels: int
    states: int
    parts: int
    """Of a stored state: the matrices that products add up to it."""

    @classmethod
    def for_sizes(cls, dtype: torch.dtype, channels: int, states: int) -> Tiling:
        """What is multiplied as fp32 fills registers sooner: tiles of 64 are for bf16."""
        largest = 64 if dtype == torch.bfloat16 else 32
        block_channels, block_states = (
            min(largest, max(16, 1 << (size - 1).bit_length())) for size in (channels, states)
        )
        return cls(largest, block_channels, block_states, parts=2 if dtype == torch.bfloat16 else 1)


@dataclass(frozen=True)
class Inputs:
    """What forward and backward share, as kernels take it."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    boundaries: Tensor | None
    initial_state: Tensor | None
    sizes: Sizes
    tiling: Tiling

    @classmethod
    def of(
        cls,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        boundaries: Tensor | None,
        initial_state: Tensor | None,
    ) -> Inputs:
        """Products take one dtype: where x, B and C differ all are widened. Parameters and states are fp32."""
        dtype = x.dtype if x.dtype == B.dtype == C.dtype else torch.float32
        tiling = Tiling.for_sizes(dtype, x.shape[3], B.shape[3])
        chunks = count_tiles(x.shape[1], 2 * tiling.positions)
        D, dt_bias, initial_state = (
            None if tensor is None else tensor.float().contiguous() for tensor in (D, dt_bias, initial_state)
        )
        return cls(
            readable(x.to(dtype)),
            readable(dt),
            A.float().contiguous(),
            readable(B.to(dtype)),
            readable(C.to(dtype)),
            D,
            dt_bias,
            None if boundaries is None else boundaries.contiguous().view(torch.uint8),
            initial_state,
            Sizes(x.shape[0], x.shape[1], chunks, x.shape[2], B.shape[2], x.shape[3], B.shape[3]),
            tiling,
        )

    @property
    def by_position(self) -> tuple[int, ...]:
        """The shape of scratch that holds a number for each position of each head."""
        return self.sizes.rows, self.sizes.heads, self.sizes.chunks, 2 * self.tiling.positions

    @property
    def channel_tiles(self) -> int:
        return count_tiles(self.sizes.channels, self.tiling.channels)

    @property
    def state_tiles(self) -> int:
        return count_tiles(self.sizes.states, self.tiling.states)

    @property
    def splits(self) -> int:
        return count_tiles(self.sizes.heads // self.sizes.groups, HEADS_PER_SPLIT)

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype)


def count_tiles(size: int, tile: int) -> int:
    """How many tiles cover a size."""
    return -(-size // tile)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs a Triton kernel on torch's current stream, if there is anything to compute.

    Of the constants, those of `compilation` say how it is compiled.
    """
    if 0 not in grid:
        major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)  # 0: interpreted
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        kernel[grid](*arguments, **constants, **compilation(10 * major + minor, **options))


def compilation(
    architecture: int, num_warps: int = 8, num_stages: int = 2, fits_twice_on_hopper: bool = False
) -> dict[str, Any]:
    """Triton's options, all of them said, because their defaults change with its versions.

    Left alone the compiler takes more than half of a multiprocessor's registers for a block, although on sm_90 some
    kernels need no more than half: two blocks then hide each other's waiting.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return options | ({"maxnreg": 128} if fits_twice_on_hopper and architecture == 90 else {})


OPTIONS = ("num_warps", "num_stages", "fits_twice_on_hopper")


def heads(tensor: Tensor) -> Heads:
    """Of (B, L, heads, size), or of delta (B, L, H)."""
    return Heads(tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2))


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself where kernels can read it (a slice of a projection is), else a copy."""
    contiguous = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if contiguous and tensor.stride(1) < LONGEST_STRIDE else tensor.contiguous()
