"""y: what a chunk's own positions add, through the scores, and what came before, through the state at its entry."""

from __future__ import annotations

import triton
import triton.language as tl

from mambatrain.ops.triton.kernels.tiles import (
    load_delta,
    load_documents,
    load_rows,
    load_state,
    load_sums,
    masked_product,
    product,
    store_rows,
)


@triton.jit
def find_outputs(
    x,
    C,
    D,
    decays,
    scores,
    entries,
    y,
    sizes,
    PARTS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of T positions of one head: reads x, C, scores and the state at the entry; writes y (B, L, H, P)."""
    chunk_head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, chunk = chunk_head % sizes.heads, chunk_head // sizes.heads % sizes.chunks
    row = chunk_head // sizes.heads // sizes.chunks
    group = head // (sizes.heads // sizes.groups)
    channels = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    within = tl.arange(0, T)
    start = (chunk * 2 + tile) * T
    real = start + within < sizes.length
    to = tile * T + within  # offsets into the chunk
    to_high, to_low = load_sums(decays, row, chunk, head, to, sizes, T)
    to_documents = load_documents(decays, row, chunk, to, sizes, T)

    out = tl.zeros((T, BLOCK_P), dtype=tl.float32)
    for n in range(0, sizes.states, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        c = load_rows(C, row, group, start, within, columns, sizes.states, real)
        for part in tl.static_range(PARTS):
            entry = load_state(entries, part * sizes.rows + row, chunk, head, channels, columns, sizes)
            out = product(c, tl.trans(entry), out)
    out = tl.where((to_documents == 0)[:, None], out * tl.exp2(to_high)[:, None], 0.0)

    for source in range(tile + 1):
        since = source * T + within
        delta = load_delta(decays, row, chunk, head, since, sizes, T)
        high, low = load_sums(decays, row, chunk, head, since, sizes, T)
        documents = load_documents(decays, row, chunk, since, sizes, T)
        mask = (to[:, None] >= since[None, :]) & (to_documents[:, None] == documents[None, :])
        first = scores + (((row * sizes.chunks + chunk) * sizes.groups + group) * 3 + tile + source) * (T * T)
        score = tl.load(first + within[:, None] * T + within[None, :])
        weights = score * tl.exp2(to_high[:, None] - high[None, :]) * (delta * tl.exp2(-low))[None, :]
        from_start = (chunk * 2 + source) * T
        keep = from_start + within < sizes.length
        value = load_rows(x, row, head, from_start, within, channels, sizes.channels, keep)
        out = masked_product(weights, mask, value, out)
    out *= tl.exp2(to_low)[:, None]
    if D is not None:
        own = load_rows(x, row, head, start, within, channels, sizes.channels, real)
        out += tl.load(D + head) * own.to(tl.float32)
    store_rows(y, row, head, start, within, channels, sizes.channels, real, out)
