"""A single position on CUDA: the Triton kernels that the operators run where there is no more, as in decoding.

Models do not see them: the operators choose them inside (`is_step`), and nothing else of a call changes. Parameters,
windows and states come in fp32 and contiguous, all else as views whose last dimension is contiguous. Not yet run on a
GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONV_CHANNELS = 128  # of a program
STATES_PER_PROGRAM = 512  # 4 a thread: few, because a single row has to fill a device
NUM_WARPS = 4


def is_step(x: Tensor) -> bool:
    """Is (B, L, ...) one position of each row, on CUDA?"""
    return x.shape[1] == 1 and x.is_cuda


def on_device_of(x: Tensor) -> torch.cuda.device:
    """Triton launches on torch's current device, which need not be that of x; none for a CPU, where it interprets."""
    return torch.cuda.device(x.device.index if x.is_cuda else -1)


def step_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    boundaries: Tensor | None,
    window: Tensor | None,
    out: Tensor,
    behind: Tensor,
) -> None:
    """`reference.causal_conv` of (B, 1, D): writes the output, and the window behind in fp32; both contiguous."""
    from mambatrain.ops.triton.arguments import count_tiles, launch
    from mambatrain.ops.triton.kernels.steps import step_conv as kernel

    rows, _, channels = x.shape
    with on_device_of(x):
        launch(
            kernel,
            (rows, count_tiles(channels, CONV_CHANNELS)),
            *(x, x.stride(0), window, weight, bias, _bytes(boundaries), out, behind, channels),
            TAPS=weight.shape[1],
            BLOCK=CONV_CHANNELS,
            num_warps=NUM_WARPS,
        )


def step_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    boundaries: Tensor | None,
    before: Tensor | None,
    out: Tensor,
    behind: Tensor,
) -> None:
    """`reference.selective_scan` of (B, 1, E): writes the output, and the state behind in fp32; both contiguous."""
    from mambatrain.ops.triton.arguments import count_tiles, launch
    from mambatrain.ops.triton.kernels.steps import step_selective_scan as kernel

    (rows, _, channels), states = u.shape, A.shape[1]
    block_channels, block_states = _tile(channels, states)
    with on_device_of(u):
        launch(
            kernel,
            (rows, count_tiles(channels, block_channels)),
            *(u, dt, z, B, C, tuple(0 if tensor is None else tensor.stride(0) for tensor in (u, dt, z, B, C))),
            *(A, D, dt_bias, _bytes(boundaries), before, out, behind, channels, states),
            BLOCK_E=block_channels,
            BLOCK_N=block_states,
            num_warps=NUM_WARPS,
        )


def step_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    boundaries: Tensor | None,
    before: Tensor | None,
    y: Tensor,
    behind: Tensor,
) -> None:
    """`reference.ssd` of (B, 1, H, P): writes the output, and the state behind in fp32; both contiguous."""
    from mambatrain.ops.triton.arguments import count_tiles, heads, launch
    from mambatrain.ops.triton.kernels.steps import step_ssd as kernel
    from mambatrain.ops.triton.kernels.tiles import Sizes

    rows, _, num_heads, channels = x.shape
    groups, states = B.shape[2:]
    block_channels, block_states = _tile(channels, states)
    with on_device_of(x):
        launch(
            kernel,
            (rows * num_heads, count_tiles(channels, block_channels)),
            *(heads(x), heads(dt), heads(B), heads(C), A, D, dt_bias, _bytes(boundaries), before, y, behind),
            Sizes(rows, 1, 1, num_heads, groups, channels, states),
            BLOCK_P=block_channels,
            BLOCK_N=block_states,
            num_warps=NUM_WARPS,
        )


def _tile(channels: int, states: int) -> tuple[int, int]:
    """Channels and states of a program, powers of 2: all states, few channels."""
    block_states = 1 << (states - 1).bit_length()
    return min(max(1, STATES_PER_PROGRAM // block_states), 1 << (channels - 1).bit_length()), block_states


def _bytes(boundaries: Tensor | None) -> Tensor | None:
    return None if boundaries is None else boundaries.contiguous().view(torch.uint8)
