"""Back through the masked products inside a chunk: gradients of the scores, and of the decays between positions."""

from __future__ import annotations

import triton
import triton.language as tl

from mambatrain.ops.triton.kernels.tiles import load_delta, load_documents, load_rows, load_sums, product


@triton.jit
def find_grad_scores(
    grad_y,
    x,
    decays,
    scores,
    grad_scores,
    inside,
    across,
    sizes,
    HEADS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile (I, J) of a chunk and group, HEADS of the group's heads: reads dy, x and the scores.

    Writes the gradient of the scores, summed over these heads (splits, B, K, G, 3, T, T), and for each head (B, H, K,
    2T) what the exponent at t gets from pairs j < t <= i: `inside` from pairs in the tile of t; `across` from tile
    (1, 0) its sums over i, at the j of tile 0, and over j, at the i of tile 1. Each sum is of its own kind: sums over
    rows minus sums over columns would be the difference of large numbers, and not exactly 0 at a boundary.
    """
    chunk_group, tile, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    group, chunk = chunk_group % sizes.groups, chunk_group // sizes.groups % sizes.chunks
    row = chunk_group // sizes.groups // sizes.chunks
    heads_per_group = sizes.heads // sizes.groups
    within = tl.arange(0, T)
    to, since = (tile + 1) // 2 * T + within, tile // 2 * T + within  # i and j, offsets into the chunk
    to_start, from_start = (chunk * 2 + (tile + 1) // 2) * T, (chunk * 2 + tile // 2) * T
    to_real, from_real = to_start + within < sizes.length, from_start + within < sizes.length
    to_documents = load_documents(decays, row, chunk, to, sizes, T)
    documents = load_documents(decays, row, chunk, since, sizes, T)
    mask = (to_documents[:, None] == documents[None, :]) & (to[:, None] >= since[None, :])
    square = within[:, None] * T + within[None, :]
    score = tl.load(scores + (chunk_group * 3 + tile) * (T * T) + square)
    total = tl.zeros((T, T), dtype=tl.float32)
    for index in range(split * HEADS, tl.minimum((split + 1) * HEADS, heads_per_group)):
        head = group * heads_per_group + index
        grad = tl.zeros((T, T), dtype=tl.float32)
        for p in range(0, sizes.channels, BLOCK_P):
            channels = p + tl.arange(0, BLOCK_P)
            g = load_rows(grad_y, row, head, to_start, within, channels, sizes.channels, to_real)
            value = load_rows(x, row, head, from_start, within, channels, sizes.channels, from_real)
            grad = product(g, tl.trans(value), grad)
        to_high, to_low = load_sums(decays, row, chunk, head, to, sizes, T)
        high, low = load_sums(decays, row, chunk, head, since, sizes, T)
        delta = load_delta(decays, row, chunk, head, since, sizes, T)
        grad *= tl.exp2(to_high[:, None] - high[None, :])
        grad = tl.where(mask, grad * tl.exp2(to_low)[:, None] * (delta * tl.exp2(-low))[None, :], 0.0)
        total += grad
        of_pairs = tl.where(mask, grad * score, 0.0)  # gradient of the logarithm of the decay from j to i
        of_head = ((row * sizes.heads + head) * sizes.chunks + chunk) * (2 * T)
        if tile == 1:
            tl.store(across + of_head + since, tl.sum(of_pairs, 0))
            tl.store(across + of_head + to, tl.sum(of_pairs, 1))
        else:
            # At [i, j] now all up to j, which is what row i adds to t = j + 1 <= i; the last column adds 0, to t = 0.
            of_pairs = tl.where(to[:, None] > since[None, :], tl.cumsum(of_pairs, 1), 0.0)
            tl.store(inside + of_head + tile // 2 * T + (within + 1) % T, tl.sum(of_pairs, 0))
    of_split = split * tl.num_programs(0).to(tl.int64) + chunk_group
    tl.store(grad_scores + (of_split * 3 + tile) * (T * T) + square, total)
