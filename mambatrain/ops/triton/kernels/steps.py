"""A single position of each operator: what decoding spends its time on. One launch each, nothing but the state is kept.

A program takes one row and some channels with all of their states, so that y is summed inside of it. Everything is
computed in fp32, whatever is read; what a boundary hides is replaced by 0 before anything is multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambatrain.ops.triton.kernels.decays import softplus


@triton.jit
def step_conv(
    x, x_row, window, weight, bias, boundaries, out, behind, channels, TAPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Reads x (B, 1, D), a view, the window before (B, TAPS - 1, D), weight (D, TAPS); writes silu(conv) (B, 1, D) and
    the window behind: that before, moved by one, and x."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < channels
    starts = _starts(boundaries, row)
    p = tl.zeros((BLOCK,), dtype=tl.float32)
    first = row * (TAPS - 1) * channels
    for tap in tl.static_range(TAPS - 1):
        before = tl.zeros((BLOCK,), dtype=tl.float32)
        if window is not None:
            before = tl.load(window + first + tap * channels + columns, mask=inside, other=0.0)
            before = tl.where(starts, 0.0, before)
        p += before * tl.load(weight + columns * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(behind + first + (tap - 1) * channels + columns, before, mask=inside)
    own = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    p += own * tl.load(weight + columns * TAPS + (TAPS - 1), mask=inside, other=0.0).to(tl.float32)
    if TAPS > 1:
        tl.store(behind + first + (TAPS - 2) * channels + columns, own, mask=inside)
    if bias is not None:
        p += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * channels + columns, _silu(p).to(out.dtype.element_ty), mask=inside)


@triton.jit
def step_selective_scan(
    u,
    dt,
    z,
    B,
    C,
    rows,
    A,
    D,
    dt_bias,
    boundaries,
    before,
    out,
    behind,
    channels,
    states,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Mamba-1: reads u, dt, z (B, 1, E) and B, C (B, 1, N), views whose row strides `rows` has in this order, A (E, N)
    and the state before (B, E, N); writes the gated output (B, 1, E) and the state behind."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    inside, in_states = e < channels, n < states
    raw = tl.load(dt + row * rows[1] + e, mask=inside, other=0.0).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + e, mask=inside, other=0.0).to(tl.float32)
    delta = softplus(raw)
    x = tl.load(u + row * rows[0] + e, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + row * rows[3] + n, mask=in_states, other=0.0).to(tl.float32)
    c = tl.load(C + row * rows[4] + n, mask=in_states, other=0.0).to(tl.float32)
    at = e[:, None] * states + n[None, :]
    mask = inside[:, None] & in_states[None, :]
    h = _load_state(before, boundaries, row, row * channels * states + at, mask)
    decay = tl.exp(delta[:, None] * tl.load(A + at, mask=mask, other=0.0))
    h = decay * h + (delta * x)[:, None] * b[None, :]
    tl.store(behind + row * channels * states + at, h, mask=mask)
    y = tl.sum(h * c[None, :], 1)
    if D is not None:
        y += tl.load(D + e, mask=inside, other=0.0).to(tl.float32) * x
    if z is not None:
        y *= _silu(tl.load(z + row * rows[2] + e, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + row * channels + e, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def step_ssd(
    x, dt, B, C, A, D, dt_bias, boundaries, before, out, behind, sizes, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Mamba-2, BLOCK_P channels of a head: reads x (B, 1, H, P), dt (B, 1, H), B and C (B, 1, G, N), views, and the
    state before (B, H, P, N); writes y (B, 1, H, P), ungated, and the state behind."""
    row, head = tl.program_id(0).to(tl.int64) // sizes.heads, tl.program_id(0) % sizes.heads
    group = head // (sizes.heads // sizes.groups)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    inside, in_states = p < sizes.channels, n < sizes.states
    raw = tl.load(dt.data + row * dt.row + head * dt.head).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + head).to(tl.float32)
    delta = softplus(raw)
    own = tl.load(x.data + row * x.row + head * x.head + p, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B.data + row * B.row + group * B.head + n, mask=in_states, other=0.0).to(tl.float32)
    c = tl.load(C.data + row * C.row + group * C.head + n, mask=in_states, other=0.0).to(tl.float32)
    first = (row * sizes.heads + head) * sizes.channels
    at = (first + p)[:, None] * sizes.states + n[None, :]
    mask = inside[:, None] & in_states[None, :]
    h = _load_state(before, boundaries, row, at, mask)
    h = tl.exp(delta * tl.load(A + head)) * h + (delta * own)[:, None] * b[None, :]
    tl.store(behind + at, h, mask=mask)
    y = tl.sum(h * c[None, :], 1)
    if D is not None:
        y += tl.load(D + head).to(tl.float32) * own
    tl.store(out + first + p, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _starts(boundaries, row):
    """Does a document start here?"""
    return False if boundaries is None else tl.load(boundaries + row) != 0


@triton.jit
def _load_state(before, boundaries, row, at, mask):
    """The state before; 0 where there is none or a document starts, by selection."""
    if before is None:
        state = tl.zeros(at.shape, dtype=tl.float32)
    else:
        state = tl.where(_starts(boundaries, row), 0.0, tl.load(before + at, mask=mask, other=0.0))
    return state


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))
