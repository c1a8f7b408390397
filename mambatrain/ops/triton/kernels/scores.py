"""C B^T of a group, once for all of its heads."""

from __future__ import annotations

import triton
import triton.language as tl

from mambatrain.ops.triton.kernels.tiles import load_rows, product


@triton.jit
def find_scores(C, B, scores, sizes, T: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile of a chunk and group: reads C and B, writes (B, K, G, 3, T, T) in fp32.

    Of the four tiles of a chunk's (2T, 2T) the three that are not above the diagonal: rows and columns are tiles 0 0,
    1 0 and 1 1, so that tile (I, J) is number I + J.
    """
    chunk_group, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, chunk = chunk_group % sizes.groups, chunk_group // sizes.groups % sizes.chunks
    row = chunk_group // sizes.groups // sizes.chunks
    within = tl.arange(0, T)
    to_start, from_start = (chunk * 2 + (tile + 1) // 2) * T, (chunk * 2 + tile // 2) * T
    to_real, from_real = to_start + within < sizes.length, from_start + within < sizes.length
    total = tl.zeros((T, T), dtype=tl.float32)
    for n in range(0, sizes.states, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        c = load_rows(C, row, group, to_start, within, columns, sizes.states, to_real)
        b = load_rows(B, row, group, from_start, within, columns, sizes.states, from_real)
        total = product(c, tl.trans(b), total)
    tl.store(scores + (chunk_group * 3 + tile) * (T * T) + within[:, None] * T + within[None, :], total)
