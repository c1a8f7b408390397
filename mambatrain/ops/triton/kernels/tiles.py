"""What the kernels share: views of tensors, tiles of them, products of matrices, decays between positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Heads(NamedTuple):
    """A tensor (B, L, heads, size), its strides in elements; the last dimension is contiguous."""

    data: Any
    row: Any
    time: Any
    head: Any


class Decays(NamedTuple):
    """Of the positions of every head, (B, H, K, 2T) in fp32; behind the last position delta is 0 and sums stay.

    high + low is the sum of the exponents of 2 from the entry of the chunk: a decay is the difference of two sums, and
    their rounding to fp32 would be its error.
    """

    delta: Any
    high: Any
    low: Any
    document: Any
    """(B, K, 2T) int32, documents started since the entry of the chunk; None: no boundaries."""


class Sizes(NamedTuple):
    """Of x (B, L, H, P) and B (B, L, G, N) in K chunks."""

    rows: Any
    length: Any
    chunks: Any
    heads: Any
    groups: Any
    channels: Any
    states: Any


@triton.jit
def load_rows(view, row, head, start, within, columns, width, keep):
    """(T, columns) of a head from position start on; 0 where `keep` (T,) is false, and from `width` on.

    Where the tile begins is computed in 64 bits, and in 32 where in it: `launch.py` copies what has larger strides.
    """
    first = view.data + row * view.row + head * view.head + start * view.time
    at = within[:, None] * view.time + columns[None, :]
    return tl.load(first + at, mask=keep[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def store_rows(view, row, head, start, within, columns, width, keep, values):
    """`load_rows`, the other way."""
    first = view.data + row * view.row + head * view.head + start * view.time
    at = within[:, None] * view.time + columns[None, :]
    mask = keep[:, None] & (columns < width)[None, :]
    tl.store(first + at, values.to(view.data.dtype.element_ty), mask=mask)


@triton.jit
def load_delta(decays, row, chunk, head, offsets, sizes, T: tl.constexpr):
    """delta at offsets into the chunk."""
    first = decays.delta + ((row * sizes.heads + head) * sizes.chunks + chunk) * (2 * T)
    return tl.load(first + offsets)


@triton.jit
def load_sums(decays, row, chunk, head, offsets, sizes, T: tl.constexpr):
    """Sums of exponents from the entry of the chunk, at offsets into it: high and low."""
    first = ((row * sizes.heads + head) * sizes.chunks + chunk) * (2 * T)
    return tl.load(decays.high + first + offsets), tl.load(decays.low + first + offsets)


@triton.jit
def load_exit(decays, row, chunk, head, sizes, T: tl.constexpr):
    """The sum of exponents over the whole chunk: high and low."""
    at = ((row * sizes.heads + head) * sizes.chunks + chunk) * (2 * T) + 2 * T - 1
    return tl.load(decays.high + at), tl.load(decays.low + at)


@triton.jit
def load_documents(decays, row, chunk, offsets, sizes, T: tl.constexpr):
    """Documents started since the entry of the chunk, at offsets into it."""
    if decays.document is None:
        documents = tl.zeros_like(offsets)
    else:
        documents = tl.load(decays.document + (row * sizes.chunks + chunk) * (2 * T) + offsets)
    return documents


@triton.jit
def load_last_document(decays, row, chunk, sizes, T: tl.constexpr):
    """Documents started in the whole chunk."""
    if decays.document is None:
        last = 0
    else:
        last = tl.load(decays.document + (row * sizes.chunks + chunk) * (2 * T) + 2 * T - 1)
    return last


@triton.jit
def load_state(states, row, chunk, head, channels, columns, sizes):
    """(channels, columns) of one head's state at a chunk, of (rows, K, H, P, N)."""
    first = states + ((row * sizes.chunks + chunk) * sizes.heads + head) * sizes.channels * sizes.states
    mask = (channels < sizes.channels)[:, None] & (columns < sizes.states)[None, :]
    return tl.load(first + channels[:, None] * sizes.states + columns[None, :], mask=mask, other=0.0)


@triton.jit
def product(a, b, total, PARTS: tl.constexpr = 2):
    """total + a b, added up in fp32. Where inputs are narrower at most one of the two is fp32.

    fp32 times bf16: the fp32 matrix in bf16 parts, 2 for 16 bits, where TF32 has 11 for the same price, 3 for all 24.
    fp16's range is too narrow for that.
    """
    if a.dtype == b.dtype:
        total = tl.dot(a, b, total, input_precision="ieee")
    elif b.dtype == tl.bfloat16:
        for _ in tl.static_range(PARTS):
            total = tl.dot(a.to(tl.bfloat16), b, total)
            a -= a.to(tl.bfloat16).to(tl.float32)
    elif a.dtype == tl.bfloat16:
        for _ in tl.static_range(PARTS):
            total = tl.dot(a, b.to(tl.bfloat16), total)
            b -= b.to(tl.bfloat16).to(tl.float32)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="tf32x3")
    return total


@triton.jit
def masked_product(weights, mask, values, total):
    """`product` of the weights inside of mask; outside a value counts for nothing, not even inf, of which 0 is NaN.

    A row of values that holds an inf or NaN is taken out, and makes NaN of whatever it has a weight in.
    """
    wide = values.to(tl.float32)
    poison = tl.sum(wide * 0.0, 1)  # 0 or NaN
    weights = tl.where(mask, weights + poison[None, :], 0.0)
    return product(weights, tl.where(wide * 0.0 == 0.0, values, tl.zeros_like(values)), total)
