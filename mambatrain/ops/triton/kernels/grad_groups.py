"""Back to B and C, which heads share: through the states first, head by head, then through the scores."""

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
def find_grad_keys(
    values,
    keys,
    decays,
    states,
    carries,
    grad_keys,
    on_paths,
    through,
    sizes,
    OF_C: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """T positions and BLOCK_N states of a chunk and group, HEADS of its heads: what passes the state at one end.

    Of C, values are dy, keys C and states those at the entry; of B, values are x, keys B and states the gradients at
    the exit. Writes the gradient of the keys without what comes through the scores, summed over these heads (splits, B,
    K, G, 2T, N) in fp32; of every head what exponents get, `on_paths` (N tiles, B, H, K, 2T), from paths between the
    entry and this position, or this position and the exit; and of C `through` (N tiles, B, H, K), from paths that pass
    the whole chunk.
    """
    chunk_group, tile, split = tl.program_id(0).to(tl.int64), tl.program_id(1) % 2, tl.program_id(1) // 2
    group, chunk = chunk_group % sizes.groups, chunk_group // sizes.groups % sizes.chunks
    row = chunk_group // sizes.groups // sizes.chunks
    heads_per_group = sizes.heads // sizes.groups
    columns = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = tl.arange(0, T)
    start = (chunk * 2 + tile) * T
    real = start + within < sizes.length
    documents = load_documents(decays, row, chunk, tile * T + within, sizes, T)
    last_document = load_last_document(decays, row, chunk, sizes, T)
    connected = ((documents == 0) if OF_C else (documents == last_document))[:, None]
    key = load_rows(keys, row, group, start, within, columns, sizes.states, real).to(tl.float32)
    total = tl.zeros((T, BLOCK_N), dtype=tl.float32)
    for index in range(split * HEADS, tl.minimum((split + 1) * HEADS, heads_per_group)):
        head = group * heads_per_group + index
        of_head = ((tl.program_id(2) * sizes.rows + row) * sizes.heads + head) * sizes.chunks + chunk
        if OF_C and tile == 0:
            passed = _pass_through(states, carries, decays, row, chunk, head, columns, sizes, PARTS, T, BLOCK_P)
            tl.store(through + of_head, tl.where(last_document > 0, 0.0, passed))
        grad = tl.zeros((T, BLOCK_N), dtype=tl.float32)
        for p in range(0, sizes.channels, BLOCK_P):
            channels = p + tl.arange(0, BLOCK_P)
            value = load_rows(values, row, head, start, within, channels, sizes.channels, real)
            for part in tl.static_range(PARTS):
                state = load_state(states, part * sizes.rows + row, chunk, head, channels, columns, sizes)
                grad = product(value, state, grad)
        grad = tl.where(connected, grad * _path_weights(decays, row, chunk, head, tile, sizes, OF_C, T)[:, None], 0.0)
        total += grad
        tl.store(on_paths + of_head * (2 * T) + tile * T + within, tl.sum(tl.where(connected, grad * key, 0.0), 1))
    of_split = split * tl.num_programs(0).to(tl.int64) + chunk_group
    first = grad_keys + (of_split * 2 + tile) * T * sizes.states
    tl.store(first + within[:, None] * sizes.states + columns[None, :], total, mask=(columns < sizes.states)[None, :])


@triton.jit
def _path_weights(decays, row, chunk, head, tile, sizes, OF_C: tl.constexpr, T: tl.constexpr):
    """(T,): the decay from the entry, or delta and the decay to the exit."""
    offsets = tile * T + tl.arange(0, T)
    high, low = load_sums(decays, row, chunk, head, offsets, sizes, T)
    if OF_C:
        weights = tl.exp2(high + low)
    else:
        exit_high, exit_low = load_exit(decays, row, chunk, head, sizes, T)
        delta = load_delta(decays, row, chunk, head, offsets, sizes, T)
        weights = delta * tl.exp2((exit_high - high) + (exit_low - low))
    return weights


@triton.jit
def _pass_through(
    states,
    carries,
    decays,
    row,
    chunk,
    head,
    columns,
    sizes,
    PARTS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The sum over columns of state, gradient at the exit and decay in between; both put together from their parts."""
    passed = 0.0
    for p in range(0, sizes.channels, BLOCK_P):
        channels = p + tl.arange(0, BLOCK_P)
        state = load_state(states, row, chunk, head, channels, columns, sizes).to(tl.float32)
        carry = load_state(carries, row, chunk, head, channels, columns, sizes).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            state += load_state(states, part * sizes.rows + row, chunk, head, channels, columns, sizes).to(tl.float32)
            carry += load_state(carries, part * sizes.rows + row, chunk, head, channels, columns, sizes).to(tl.float32)
        passed += tl.sum(state * carry)
    exit_high, exit_low = load_exit(decays, row, chunk, head, sizes, T)
    return passed * tl.exp2(exit_high + exit_low)


@triton.jit
def add_grad_scores(
    others,
    decays,
    grad_scores,
    partial,
    grad_keys,
    sizes,
    num_splits,
    OF_C: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """T positions and BLOCK_N states of a chunk and group: sums the splits in their order, adds what scores have had.

    Of C, the others are B, and the gradients of the scores are read by row; of B, C and by column. Writes the gradient
    (B, L, G, N).
    """
    chunk_group, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, chunk = chunk_group % sizes.groups, chunk_group // sizes.groups % sizes.chunks
    row = chunk_group // sizes.groups // sizes.chunks
    columns = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = tl.arange(0, T)
    documents = load_documents(decays, row, chunk, tile * T + within, sizes, T)
    num_chunk_groups = tl.num_programs(0).to(tl.int64)
    total = tl.zeros((T, BLOCK_N), dtype=tl.float32)
    for split in range(num_splits):
        first = partial + ((split * num_chunk_groups + chunk_group) * 2 + tile) * T * sizes.states
        at = first + within[:, None] * sizes.states + columns[None, :]
        total += tl.load(at, mask=(columns < sizes.states)[None, :], other=0.0)
    row_stride, column_stride = (T, 1) if OF_C else (1, T)
    for other in range(0 if OF_C else tile, tile + 1 if OF_C else 2):
        grads = tl.zeros((T, T), dtype=tl.float32)
        for split in range(num_splits):
            first = grad_scores + ((split * num_chunk_groups + chunk_group) * 3 + tile + other) * (T * T)
            grads += tl.load(first + within[:, None] * row_stride + within[None, :] * column_stride)
        same = documents[:, None] == load_documents(decays, row, chunk, other * T + within, sizes, T)[None, :]
        apart = (tile - other) * T + within[:, None] - within[None, :]
        start = (chunk * 2 + other) * T
        real = start + within < sizes.length
        value = load_rows(others, row, group, start, within, columns, sizes.states, real)
        total = masked_product(grads, same & ((apart >= 0) if OF_C else (apart <= 0)), value, total)
    start = (chunk * 2 + tile) * T
    store_rows(grad_keys, row, group, start, within, columns, sizes.states, start + within < sizes.length, total)
