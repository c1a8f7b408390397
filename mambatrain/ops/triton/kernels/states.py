"""States from chunk to chunk, and their gradients back: the only kernel that is serial in time."""

from __future__ import annotations

import triton
import triton.language as tl

from mambatrain.ops.triton.kernels.tiles import (
    load_delta,
    load_documents,
    load_exit,
    load_last_document,
    load_rows,
    load_sums,
    product,
)


@triton.jit
def pass_states(
    values,
    keys,
    decays,
    before,
    states,
    behind,
    sizes,
    BACKWARD: tl.constexpr,
    PARTS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of one head's state through all chunks of a row.

    Forward, values are x and keys B: writes the state at the entry of each chunk. Backward, values are dy and keys C:
    writes the gradient of the state at the exit of each chunk, without the chunk's own. `before` (B, H, P, N), what to
    begin with, and `behind`, what is left, are in fp32; `states` (PARTS, B, K, H, P, N) in the dtype that products
    take: fp32, or two bf16 parts.

    Where a document starts the state is dropped, and positions on the other side are not read: by selection.
    """
    row, head = tl.program_id(0).to(tl.int64) // sizes.heads, tl.program_id(0) % sizes.heads
    group = head // (sizes.heads // sizes.groups)
    channels = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (channels < sizes.channels)[:, None] & (columns < sizes.states)[None, :]
    local = channels[:, None] * sizes.states + columns[None, :]
    head_states = sizes.channels * sizes.states
    state = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    if before is not None:
        state = tl.load(before + (row * sizes.heads + head) * head_states + local, mask=inside, other=0.0)
    within = tl.arange(0, T)
    for step in range(sizes.chunks * 2):  # one loop, so that the tiles of the next step are on their way
        chunk = sizes.chunks - 1 - step // 2 if BACKWARD else step // 2
        last_document = load_last_document(decays, row, chunk, sizes, T)
        exit_high, exit_low = load_exit(decays, row, chunk, head, sizes, T)
        if step % 2 == 0:
            first = states + ((row * sizes.chunks + chunk) * sizes.heads + head) * head_states
            _store_parts(first, state, local, inside, sizes, PARTS)
            state = tl.where(last_document > 0, 0.0, state * tl.exp2(exit_high + exit_low))
        start = (tl.cast(chunk, tl.int64) * 2 + step % 2) * T
        offsets = step % 2 * T + within
        high, low = load_sums(decays, row, chunk, head, offsets, sizes, T)
        documents = load_documents(decays, row, chunk, offsets, sizes, T)
        if BACKWARD:
            keep = (start + within < sizes.length) & (documents == 0)
            weights = tl.exp2(high + low)  # decay from the entry
        else:
            keep = (start + within < sizes.length) & (documents == last_document)
            delta = load_delta(decays, row, chunk, head, offsets, sizes, T)
            weights = delta * tl.exp2((exit_high - high) + (exit_low - low))  # decay to the exit
        value = load_rows(values, row, head, start, within, channels, sizes.channels, keep)  # (T, BLOCK_P)
        key = load_rows(keys, row, group, start, within, columns, sizes.states, keep)  # (T, BLOCK_N)
        weighted = key.to(tl.float32) * tl.where(keep, weights, 0.0)[:, None]  # 0, even where delta is NaN
        state = product(tl.trans(value), weighted, state, PARTS=3)
    tl.store(behind + (row * sizes.heads + head) * head_states + local, state, mask=inside)


@triton.jit
def _store_parts(first, state, local, inside, sizes, PARTS: tl.constexpr):
    """What products take instead of fp32: its rounding, and the rounding of what is left."""
    part_size = tl.num_programs(0).to(tl.int64) * sizes.chunks * sizes.channels * sizes.states  # rows times heads
    for part in tl.static_range(PARTS):
        stored = state.to(first.dtype.element_ty)
        tl.store(first + part * part_size + local, stored, mask=inside)
        state -= stored.to(tl.float32)
