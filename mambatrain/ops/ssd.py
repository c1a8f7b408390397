"""Mamba-2's scan in plain torch: matrix products inside chunks, states between them (arXiv 2405.21060, section 6).

Forward keeps the state at the entry of each chunk and nothing else that is not an input; backward recomputes the rest.
The mathematics of a chunk is in `ssd_chunks.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambatrain.ops import reference
from mambatrain.ops.reference import computing_dtype
from mambatrain.ops.shapes import check_ssd
from mambatrain.ops.ssd_chunks import Chunks

CHUNK = 64  # positions
SEGMENT = 512  # positions that a CPU computes at once, a multiple of CHUNK; bounds the temporary memory


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    boundaries: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan of `reference.ssd`, fast: same arguments, same results, differentiable once.

    Args:
        x: (B, L, H, P); it and all others may be strided views.
        dt: (B, L, H) raw delta, before bias and softplus.
        A: (H,), negative.
        B: (B, L, G, N).
        C: (B, L, G, N).
        D: (H,) skip.
        dt_bias: (H,).
        boundaries: (B, L) bool.
        initial_state: (B, H, P, N).

    Returns:
        y (B, L, H, P) in the dtype of x, and the state behind the last position (B, H, P, N) in fp32 (fp64 for fp64).

    Raises:
        ValueError: an argument has a wrong shape, dtype or device; nothing was computed.
    """
    check_ssd(x, dt, A, B, C, D, dt_bias, boundaries, initial_state)
    if boundaries is not None and not all(_is_finite(tensor) for tensor in (x, dt, B, C)):
        # A matrix product multiplies by its mask and 0 inf is NaN; the serial form drops the state by selection.
        with torch.autocast(x.device.type, enabled=False):
            return reference.ssd(x, dt, A, B, C, D, dt_bias, boundaries=boundaries, initial_state=initial_state)
    floats = (x, dt, A, B, C, D, dt_bias, initial_state)
    keep_entries = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in floats)
    y, state = _SSD.apply(*floats, boundaries, keep_entries)  # type: ignore[no-untyped-call]
    return y, state


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = tensor.detach().aminmax()
    return math.isfinite(low) and math.isfinite(high)


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, keep_entries = arguments
        x, dt, A, B, C, D, dt_bias, initial_state, boundaries = tensors
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        state = _inner_state(initial_state, x, B)
        entries = []
        with torch.autocast(x.device.type, enabled=False):
            for span, q in _segments(x):
                chunks = Chunks(x, dt, A, B, C, dt_bias, boundaries, span, q)
                entry, state = chunks.pass_states(state)
                y_chunks = chunks.outputs(entry)
                if D is not None:
                    y_chunks.addcmul_(chunks.x, D.to(state.dtype)[:, None])
                y[:, span] = y_chunks.flatten(1, 2)
                if keep_entries:
                    entries.append(entry)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *entries)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, dt_bias, initial_state, boundaries, *entries = ctx.saved_tensors
        dtype = computing_dtype(x)
        dx, ddt, dB, dC = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, dt, B, C))
        dA, dD, dbias = (x.new_zeros(x.shape[2], dtype=dtype) for _ in range(3))
        carry = _inner_state(grad_state, x, B)
        with torch.autocast(x.device.type, enabled=False):
            for (span, q), entry in zip(reversed(_segments(x)), reversed(entries), strict=True):
                chunks = Chunks(x, dt, A, B, C, dt_bias, boundaries, span, q)
                g = torch.zeros_like(x[:, span]) if grad_y is None else grad_y[:, span]
                g = torch.unflatten(g.to(dtype), 1, (-1, q))
                grads, carry = chunks.run_back(g, entry, carry)
                if D is not None:
                    grads.x.addcmul_(g, D.to(dtype)[:, None])
                    dD += (g * chunks.x).sum((0, 1, 2, 4))
                dx[:, span] = grads.x.flatten(1, 2)
                ddt[:, span] = grads.raw.flatten(1, 2)
                dB[:, span] = grads.B.transpose(2, 3).flatten(1, 2)
                dC[:, span] = grads.C.transpose(2, 3).flatten(1, 2)
                dA += grads.A
                dbias += grads.raw.sum((0, 1, 2))
        return (
            dx,
            ddt,
            dA.to(A.dtype),
            dB,
            dC,
            None if D is None else dD.to(D.dtype),
            None if dt_bias is None else dbias.to(dt_bias.dtype),
            None if initial_state is None else carry.to(initial_state.dtype),
            None,
            None,
        )


def _segments(x: Tensor) -> list[tuple[slice, int]]:
    """Positions computed at once, and the length of their chunks; the last, shorter chunk is a segment of its own."""
    length = x.shape[1]
    whole = length - length % CHUNK
    step = SEGMENT if x.device.type == "cpu" else max(CHUNK, whole)
    segments = [(slice(start, min(start + step, whole)), CHUNK) for start in range(0, whole, step)]
    return segments if whole == length else [*segments, (slice(whole, length), length - whole)]


def _inner_state(state: Tensor | None, x: Tensor, B: Tensor) -> Tensor:
    """(B, H, P, N) in the computing dtype."""
    if state is not None:
        return state.to(computing_dtype(x))
    return x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=computing_dtype(x))
