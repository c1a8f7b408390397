"""Back to raw delta, A and the bias: what exponents have had on every path, summed over the paths that pass t."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum_tiles(tensor, first, stride, count, mask):
    """Of (count, stride) numbers, those at `first` of each tile."""
    total = tl.load(tensor + first, mask=mask, other=0.0)
    for tile in range(1, count):
        total += tl.load(tensor + tile * stride + first, mask=mask, other=0.0)
    return total


@triton.jit
def find_grad_delta(
    dt,
    dt_bias,
    A,
    decays,
    inside,
    across,
    direct,
    from_entry,
    to_exit,
    through,
    grad_dt,
    grad_A,
    grad_bias,
    sizes,
    channel_tiles,
    state_tiles,
    T: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One chunk of a row, HEADS heads: reads raw delta and what the other kernels have written of exponents.

    Writes the gradient of dt (B, L, H), and those of A and the bias summed over the chunk (B, K, H) in fp32.
    The exponent at t lies on every path that comes in before t and leaves at t or behind.
    """
    row, chunk = tl.program_id(0).to(tl.int64) // sizes.chunks, tl.program_id(0) % sizes.chunks
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    offsets = tl.arange(0, 2 * T)
    known = (heads < sizes.heads)[:, None]
    of_heads = ((row * sizes.heads + heads) * sizes.chunks + chunk)[:, None]  # (HEADS, 1)
    at = of_heads * (2 * T) + offsets[None, :]  # (HEADS, 2T)
    stride = tl.cast(sizes.rows, tl.int64) * sizes.heads * sizes.chunks * (2 * T)
    everywhere = known & (offsets >= 0)[None, :]
    total = tl.load(inside + at, mask=everywhere, other=0.0) + _sum_across(across, at, offsets, everywhere, T)
    left_at = _sum_tiles(from_entry, at, stride, state_tiles, everywhere)
    total += tl.cumsum(left_at, 1, reverse=True)
    total += _sum_tiles(through, of_heads, stride // (2 * T), state_tiles, known)
    earlier = everywhere & (offsets >= 1)[None, :]
    total += tl.cumsum(_sum_tiles(to_exit, at - 1, stride, state_tiles, earlier), 1)

    positions = chunk * (2 * T) + offsets
    real = known & (positions < sizes.length)[None, :]
    delta = tl.load(decays.delta + at, mask=real, other=0.0)
    rate = tl.load(A + heads, mask=heads < sizes.heads, other=0.0)
    tl.store(
        grad_A + (row * sizes.chunks + chunk) * sizes.heads + heads,
        _sum_real(total * delta, real),
        mask=heads < sizes.heads,
    )
    grad = _sum_tiles(direct, at, stride, channel_tiles, everywhere) + total * rate[:, None]
    raw_at = row * dt.row + positions.to(tl.int64)[None, :] * dt.time + heads[:, None] * dt.head
    raw = tl.load(dt.data + raw_at, mask=real, other=0.0).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + heads, mask=heads < sizes.heads, other=0.0)[:, None]
    grad = tl.where(raw > 20.0, grad, grad / (1.0 + tl.exp(-raw)))
    tl.store(
        grad_bias + (row * sizes.chunks + chunk) * sizes.heads + heads, _sum_real(grad, real), mask=heads < sizes.heads
    )
    out = row * grad_dt.row + positions.to(tl.int64)[None, :] * grad_dt.time + heads[:, None] * grad_dt.head
    tl.store(grad_dt.data + out, grad.to(grad_dt.data.dtype.element_ty), mask=real)


@triton.jit
def _sum_across(across, at, offsets, everywhere, T: tl.constexpr):
    """At t in tile 0 what came in before it, at t in tile 1 what leaves there or behind, of pairs in tile (1, 0)."""
    first = (offsets < T)[None, :]
    came_at = tl.load(across + at - 1, mask=everywhere & first & (offsets >= 1)[None, :], other=0.0)
    left_at = tl.load(across + at, mask=everywhere & (offsets >= T)[None, :], other=0.0)
    return tl.where(first, tl.cumsum(came_at, 1), tl.cumsum(left_at, 1, reverse=True))


@triton.jit
def _sum_real(values, real):
    return tl.sum(tl.where(real, values, 0.0), 1)
