"""Back to x: through the outputs of its own chunk, and through the state at the exit."""

from __future__ import annotations

import triton
import triton.language as tl

from mambatrain.ops.triton.kernels.tiles import (
    load_delta,
    load_documents,
    load_exit,
    load_last_document,
    load_rows,
    load_state,
    load_sums,
    masked_product,
    product,
    store_rows,
)


@triton.jit
def find_grad_inputs(
    grad_y,
    x,
    B,
    D,
    decays,
    scores,
    carries,
    grad_x,
    direct,
    skip,
    sizes,
    PARTS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of T positions of one head: reads dy, x, B, scores and the gradient of the state at the exit.

    Writes dx (B, L, H, P); `direct` (P tiles, B, H, K, 2T), the gradient of delta as the factor of x; `skip` (P tiles,
    B, K, 2, H), the sum of dy x, of which dD is made.
    """
    chunk_head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, chunk = chunk_head % sizes.heads, chunk_head // sizes.heads % sizes.chunks
    row = chunk_head // sizes.heads // sizes.chunks
    channels = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    within = tl.arange(0, T)
    start = (chunk * 2 + tile) * T
    real = start + within < sizes.length
    since = tile * T + within  # offsets into the chunk

    grad = _through_state(B, decays, carries, row, chunk, head, tile, channels, sizes, PARTS, T, BLOCK_N)
    high, low = load_sums(decays, row, chunk, head, since, sizes, T)
    documents = load_documents(decays, row, chunk, since, sizes, T)
    for target in range(tile, 2):
        to = target * T + within
        to_high, to_low = load_sums(decays, row, chunk, head, to, sizes, T)
        to_documents = load_documents(decays, row, chunk, to, sizes, T)
        mask = (to[None, :] >= since[:, None]) & (to_documents[None, :] == documents[:, None])  # [j, i]
        group = head // (sizes.heads // sizes.groups)
        first = scores + (((row * sizes.chunks + chunk) * sizes.groups + group) * 3 + tile + target) * (T * T)
        score = tl.load(first + within[None, :] * T + within[:, None])
        weights = score * tl.exp2(to_high[None, :] - high[:, None]) * tl.exp2(to_low)[None, :]
        to_start = (chunk * 2 + target) * T
        keep = to_start + within < sizes.length
        g = load_rows(grad_y, row, head, to_start, within, channels, sizes.channels, keep)
        grad = masked_product(weights, mask, g, grad)
    grad *= tl.exp2(-low)[:, None]  # of delta x

    value = load_rows(x, row, head, start, within, channels, sizes.channels, real).to(tl.float32)
    tile_row = tl.program_id(2) * sizes.rows + row
    of_head = ((tile_row * sizes.heads + head) * sizes.chunks + chunk) * (2 * T)
    tl.store(direct + of_head + since, tl.sum(grad * value, 1))
    grad *= load_delta(decays, row, chunk, head, since, sizes, T)[:, None]
    if D is not None:
        g = load_rows(grad_y, row, head, start, within, channels, sizes.channels, real).to(tl.float32)
        grad += tl.load(D + head) * g
        tl.store(skip + ((tile_row * sizes.chunks + chunk) * 2 + tile) * sizes.heads + head, tl.sum(g * value))
    store_rows(grad_x, row, head, start, within, channels, sizes.channels, real, grad)


@triton.jit
def _through_state(
    B,
    decays,
    carries,
    row,
    chunk,
    head,
    tile,
    channels,
    sizes,
    PARTS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(T, channels): 2^low times the gradient of delta x from the state at the exit, 0 where one starts before."""
    group = head // (sizes.heads // sizes.groups)
    within = tl.arange(0, T)
    start = (chunk * 2 + tile) * T
    real = start + within < sizes.length
    grad = tl.zeros((T, channels.shape[0]), dtype=tl.float32)
    for n in range(0, sizes.states, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        b = load_rows(B, row, group, start, within, columns, sizes.states, real)
        for part in tl.static_range(PARTS):
            carry = load_state(carries, part * sizes.rows + row, chunk, head, channels, columns, sizes)
            grad = product(b, tl.trans(carry), grad)
    high, _low = load_sums(decays, row, chunk, head, tile * T + within, sizes, T)
    exit_high, exit_low = load_exit(decays, row, chunk, head, sizes, T)
    to_exit = tl.exp2((exit_high - high) + exit_low)
    documents = load_documents(decays, row, chunk, tile * T + within, sizes, T)
    hands_on = documents == load_last_document(decays, row, chunk, sizes, T)
    return tl.where(hands_on[:, None], grad * to_exit[:, None], 0.0)
