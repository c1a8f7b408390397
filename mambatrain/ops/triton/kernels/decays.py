"""From raw delta and boundaries: what every other kernel needs to know of time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(raw):
    """log(1 + e^raw), and raw itself beyond 20. The quotient gives back what 1 + e^raw has rounded off e^raw."""
    e = tl.exp(raw)
    near_one = 1.0 + e
    small = tl.where(near_one == 1.0, e, tl.log(near_one) * (e / tl.where(near_one == 1.0, 1.0, near_one - 1.0)))
    return tl.where(raw > 20.0, raw, small)


@triton.jit
def find_decays(dt, dt_bias, A, boundaries, decays, sizes, T: tl.constexpr, HEADS: tl.constexpr):
    """One chunk of a row, HEADS heads: reads dt (B, L, H), a view; boundaries (B, L). Writes `Decays`.

    Sums are in fp64, of exponents bounded from below: one that gives 0 in fp32 may be as large as it likes, and would
    drown the others. A NaN stays in its document: it is in delta, and not in the sums.
    """
    row, chunk = tl.program_id(0).to(tl.int64) // sizes.chunks, tl.program_id(0) % sizes.chunks
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    offsets = tl.arange(0, 2 * T)
    positions = chunk * (2 * T) + offsets
    real = (positions < sizes.length)[:, None] & (heads < sizes.heads)[None, :]
    at = row * dt.row + positions.to(tl.int64)[:, None] * dt.time + heads[None, :] * dt.head
    raw = tl.load(dt.data + at, mask=real, other=0.0).to(tl.float32)  # (2T, HEADS)
    if dt_bias is not None:
        raw += tl.load(dt_bias + heads, mask=heads < sizes.heads, other=0.0)[None, :]
    delta = tl.where(real, softplus(raw), 0.0)
    rate = tl.load(A + heads, mask=heads < sizes.heads, other=0.0).to(tl.float64) * 1.4426950408889634  # log2(e)
    exponents = delta.to(tl.float64) * rate[None, :]
    broken = exponents != exponents
    delta = tl.where(broken, float("nan"), delta)
    exponents = tl.where(broken, 0.0, tl.where(exponents < -2000.0, -2000.0, exponents))
    sums = tl.cumsum(exponents, 0)
    high = sums.to(tl.float32)
    low = (sums - high.to(tl.float64)).to(tl.float32)
    out = ((row * sizes.heads + heads)[None, :] * sizes.chunks + chunk) * (2 * T) + offsets[:, None]
    inside = (heads < sizes.heads)[None, :]
    tl.store(decays.delta + out, delta, mask=inside)
    tl.store(decays.high + out, high, mask=inside)
    tl.store(decays.low + out, low, mask=inside)
    if decays.document is not None and tl.program_id(1) == 0:
        starts = tl.load(boundaries + row * sizes.length + positions, mask=positions < sizes.length, other=0)
        documents = tl.cumsum(starts.to(tl.int32), 0)
        tl.store(decays.document + (row * sizes.chunks + chunk) * (2 * T) + offsets, documents)
