"""Mamba-2's scan kernel by kernel: what each reads and writes, how large its tiles are, where its scratch lies.

    find_decays       dt, boundaries -> delta, sums of exponents, documents       a program: 16 heads of a chunk
    find_scores       C, B -> C B^T, in fp32                                      a tile of a chunk and group
    pass_states       x, B -> states at the entry of chunks, final state          a tile of a head's state, all chunks
    find_outputs      x, C, scores, entries -> y                                  a tile of a chunk and head

and backward, after the first three again, which costs less memory than keeping what they wrote:

    pass_states       dy, C -> gradients of states at the exit of chunks (carries), of the initial state
    find_grad_scores  dy, x, scores -> gradients of scores, of exponents          a tile of a chunk, 8 heads of a group
    find_grad_inputs  dy, x, B, scores, carries -> dx, parts of d delta and dD    a tile of a chunk and head
    find_grad_keys    dy, C, entries (x, B, carries) -> parts of dC (dB), of exponents    as find_grad_scores
    add_grad_scores   B (C), these parts -> dC (dB)                               a tile of a chunk and group
    find_grad_delta   dt, these parts -> d dt, parts of dA and d bias             16 heads of a chunk

Against mamba-ssm's kernels: 4 launches forward instead of 5 and 11 backward instead of 14; a state is written once and
read once forward, because one kernel both makes and passes it; dy x^T is computed once and not twice; y needs 3 of the
4 tiles of a chunk's scores. Tiles are fixed, not tuned by timing: another tile adds in another order, and a run would
not give the same bits twice. Nobody has measured them on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambatrain.ops.triton.arguments import (
    HEADS_PER_PROGRAM,
    HEADS_PER_SPLIT,
    Inputs,
    count_tiles,
    heads,
    launch,
    readable,
)
from mambatrain.ops.triton.kernels.decays import find_decays
from mambatrain.ops.triton.kernels.grad_delta import find_grad_delta
from mambatrain.ops.triton.kernels.grad_groups import add_grad_scores, find_grad_keys
from mambatrain.ops.triton.kernels.grad_inputs import find_grad_inputs
from mambatrain.ops.triton.kernels.grad_scores import find_grad_scores
from mambatrain.ops.triton.kernels.outputs import find_outputs
from mambatrain.ops.triton.kernels.scores import find_scores
from mambatrain.ops.triton.kernels.states import pass_states
from mambatrain.ops.triton.kernels.tiles import Decays


def run_forward(inputs: Inputs, y: Tensor, state: Tensor) -> None:
    """Writes y (B, L, H, P) and the final state (B, H, P, N) in fp32."""
    decays, scores = _prepare(inputs)
    entries = _pass_states(inputs, inputs.x, inputs.B, decays, inputs.initial_state, state, backward=False)
    sizes, tiling = inputs.sizes, inputs.tiling
    launch(
        find_outputs,
        (sizes.rows * sizes.chunks * sizes.heads, 2, inputs.channel_tiles),
        *(heads(inputs.x), heads(inputs.C), inputs.D, decays, scores, entries, heads(y), sizes),
        PARTS=tiling.parts,
        T=tiling.positions,
        BLOCK_P=tiling.channels,
        BLOCK_N=tiling.states,
        fits_twice_on_hopper=tiling.parts == 2,
    )


def run_backward(inputs: Inputs, grad_y: Tensor, grad_state: Tensor | None, gradients: list[Tensor]) -> None:
    """Writes the gradients of x, dt, A, B, C, D, bias and initial state; parameters' and states' are fp32."""
    dx, ddt, dA, dB, dC, dD, dbias, dinitial = gradients
    grad_y = readable(grad_y.to(inputs.x.dtype))
    grad_state = None if grad_state is None else grad_state.float().contiguous()
    decays, scores = _prepare(inputs)
    entries = _pass_states(
        inputs, inputs.x, inputs.B, decays, inputs.initial_state, torch.empty_like(dinitial), backward=False
    )
    carries = _pass_states(inputs, grad_y, inputs.C, decays, grad_state, dinitial, backward=True)
    inside, across, grad_scores = _find_grad_scores(inputs, grad_y, decays, scores)
    direct = _find_grad_inputs(inputs, grad_y, decays, scores, carries, dx, dD)
    from_entry, through = _find_grad_keys(inputs, grad_y, decays, entries, carries, grad_scores, dC, of_C=True)
    to_exit, _ = _find_grad_keys(inputs, inputs.x, decays, carries, entries, grad_scores, dB, of_C=False)
    sizes = inputs.sizes
    parts_of_A, parts_of_bias = (inputs.scratch(sizes.rows * sizes.chunks, sizes.heads) for _ in range(2))
    launch(
        find_grad_delta,
        (sizes.rows * sizes.chunks, count_tiles(sizes.heads, HEADS_PER_PROGRAM)),
        *(heads(inputs.dt), inputs.dt_bias, inputs.A, decays, inside, across, direct, from_entry, to_exit, through),
        *(heads(ddt), parts_of_A, parts_of_bias, sizes, inputs.channel_tiles, inputs.state_tiles),
        T=inputs.tiling.positions,
        HEADS=HEADS_PER_PROGRAM,
    )
    torch.sum(parts_of_A, 0, out=dA)
    torch.sum(parts_of_bias, 0, out=dbias)


def _prepare(inputs: Inputs) -> tuple[Decays, Tensor]:
    """Decays, and the scores (B, K, G, 3, T, T)."""
    sizes, tiling = inputs.sizes, inputs.tiling
    T = tiling.positions
    document = None
    if inputs.boundaries is not None:
        document = inputs.scratch(sizes.rows, sizes.chunks, 2 * T, dtype=torch.int32)
    delta, high, low = (inputs.scratch(*inputs.by_position) for _ in range(3))
    decays = Decays(delta, high, low, document)
    launch(
        find_decays,
        (sizes.rows * sizes.chunks, count_tiles(sizes.heads, HEADS_PER_PROGRAM)),
        *(heads(inputs.dt), inputs.dt_bias, inputs.A, inputs.boundaries, decays, sizes),
        T=T,
        HEADS=HEADS_PER_PROGRAM,
    )
    scores = inputs.scratch(sizes.rows, sizes.chunks, sizes.groups, 3, T, T)
    launch(
        find_scores,
        (sizes.rows * sizes.chunks * sizes.groups, 3),
        *(heads(inputs.C), heads(inputs.B), scores, sizes),
        T=T,
        BLOCK_N=tiling.states,
    )
    return decays, scores


def _pass_states(
    inputs: Inputs, values: Tensor, keys: Tensor, decays: Decays, before: Tensor | None, behind: Tensor, backward: bool
) -> Tensor:
    """The states at one end of every chunk (parts, B, K, H, P, N)."""
    sizes, tiling = inputs.sizes, inputs.tiling
    block = min(tiling.states, 32)  # smaller tiles, because time gives this kernel no programs
    shape = (tiling.parts, sizes.rows, sizes.chunks, sizes.heads, sizes.channels, sizes.states)
    states = inputs.scratch(*shape, dtype=torch.float32 if tiling.parts == 1 else inputs.x.dtype)
    launch(
        pass_states,
        (sizes.rows * sizes.heads, inputs.channel_tiles, count_tiles(sizes.states, block)),
        *(heads(values), heads(keys), decays, before, states, behind, sizes),
        BACKWARD=backward,
        PARTS=tiling.parts,
        T=tiling.positions,
        BLOCK_P=tiling.channels,
        BLOCK_N=block,
        num_warps=4 if tiling.parts == 2 else 8,
    )
    return states


def _find_grad_scores(inputs: Inputs, grad_y: Tensor, decays: Decays, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sizes, tiling = inputs.sizes, inputs.tiling
    inside, across = inputs.scratch(*inputs.by_position), inputs.scratch(*inputs.by_position)
    grad_scores = inputs.scratch(inputs.splits, *scores.shape)
    launch(
        find_grad_scores,
        (sizes.rows * sizes.chunks * sizes.groups, 3, inputs.splits),
        *(heads(grad_y), heads(inputs.x), decays, scores, grad_scores, inside, across, sizes),
        HEADS=HEADS_PER_SPLIT,
        T=tiling.positions,
        BLOCK_P=tiling.channels,
    )
    return inside, across, grad_scores


def _find_grad_inputs(
    inputs: Inputs, grad_y: Tensor, decays: Decays, scores: Tensor, carries: Tensor, dx: Tensor, dD: Tensor
) -> Tensor:
    sizes, tiling = inputs.sizes, inputs.tiling
    direct = inputs.scratch(inputs.channel_tiles, *inputs.by_position)
    skip = inputs.scratch(inputs.channel_tiles * sizes.rows * sizes.chunks * 2, sizes.heads)
    launch(
        find_grad_inputs,
        (sizes.rows * sizes.chunks * sizes.heads, 2, inputs.channel_tiles),
        *(heads(grad_y), heads(inputs.x), heads(inputs.B), inputs.D, decays, scores, carries),
        *(heads(dx), direct, skip, sizes),
        PARTS=tiling.parts,
        T=tiling.positions,
        BLOCK_P=tiling.channels,
        BLOCK_N=tiling.states,
        num_stages=1,
        fits_twice_on_hopper=tiling.parts == 2,
    )
    if inputs.D is not None:
        torch.sum(skip, 0, out=dD)
    return direct


def _find_grad_keys(
    inputs: Inputs,
    values: Tensor,
    decays: Decays,
    states: Tensor,
    carries: Tensor,
    grad_scores: Tensor,
    grad_keys: Tensor,
    of_C: bool,
) -> tuple[Tensor, Tensor]:
    """Writes dC or dB; what exponents have of paths that end at one end of the chunk, and of those that pass it."""
    sizes, tiling, state_tiles = inputs.sizes, inputs.tiling, inputs.state_tiles
    T, chunk_groups = tiling.positions, sizes.rows * sizes.chunks * sizes.groups
    keys, others = (inputs.C, inputs.B) if of_C else (inputs.B, inputs.C)
    partial = inputs.scratch(inputs.splits, chunk_groups, 2 * T, sizes.states)
    on_paths = inputs.scratch(state_tiles, *inputs.by_position)
    through = inputs.scratch(state_tiles, *inputs.by_position[:3])
    launch(
        find_grad_keys,
        (chunk_groups, 2 * inputs.splits, state_tiles),
        *(heads(values), heads(keys), decays, states, carries, partial, on_paths, through, sizes),
        OF_C=of_C,
        HEADS=HEADS_PER_SPLIT,
        PARTS=tiling.parts,
        T=T,
        BLOCK_P=tiling.channels,
        BLOCK_N=tiling.states,
        fits_twice_on_hopper=of_C and tiling.parts == 2,
    )
    launch(
        add_grad_scores,
        (chunk_groups, 2, state_tiles),
        *(heads(others), decays, grad_scores, partial, heads(grad_keys), sizes, inputs.splits),
        OF_C=of_C,
        T=T,
        BLOCK_N=tiling.states,
    )
    return on_paths, through
