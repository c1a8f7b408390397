"""How many rows at once, and how many blocks computed again: what the memory that is free allows, by an estimate.

Per token and layer about 40 d_model + 20 E bytes are kept for the backward pass in mixed precision, twice that in fp32;
of a block that is computed again its input alone (4 d_model). Weights, gradients and two moments take 16 bytes a
parameter. Of what is left half may be filled: an estimate on the safe side, made before anything is built.
"""

from __future__ import annotations

from mambatrain.models.flops import count_parameters
from mambatrain.recipe import Recipe


def choose_micro_batch_rows(recipe: Recipe, rows: int, free_bytes: int, num_parts: int = 1, shards: int = 1) -> int:
    """The largest divisor of a rank's rows whose activations fit.

    Args:
        recipe: says how many blocks are computed again.
        rows: of a rank in a step.
        free_bytes: on the device.
        num_parts: ranks that share a row; each has one part of it.
        shards: ranks that share a copy of the model.
    """
    of_row = bytes_of_row(recipe, recipe.recompute_every, recipe.data.row_tokens, num_parts)
    fitting = room_for_activations(recipe, free_bytes, shards) // of_row
    return next((n for n in range(min(rows, max(1, fitting)), 0, -1) if rows % n == 0), 1)


def choose_recompute_every(recipe: Recipe, at_once: int, free_bytes: int, num_parts: int = 1, shards: int = 1) -> int:
    """The fewest blocks computed again with which a micro-batch fits: none, every k-th for falling k, every block.

    Where nothing fits it is every block.

    Args:
        recipe: with `training.activation_checkpointing: auto`.
        at_once: rows of a micro-batch.
        free_bytes, num_parts, shards: as above.
    """
    room, data = room_for_activations(recipe, free_bytes, shards), recipe.data
    choices: list[int] = [0, *range(recipe.model.num_layers, 1, -1)]
    for every in choices:
        rows = at_once * bytes_of_row(recipe, every, data.row_tokens, num_parts)
        longest = bytes_of_row(recipe, every, data.longest_row_tokens, num_parts)  # of a stage: one at least
        if max(rows, longest) <= room:
            return every
    return 1


def bytes_of_row(recipe: Recipe, recompute_every: int, row_tokens: int, num_parts: int = 1) -> int:
    """What a row, or a rank's part of it, keeps for the backward pass."""
    model = recipe.model
    per_layer = 2 * (40 * model.d_model + 20 * model.d_inner)
    recomputed = model.num_layers // recompute_every if recompute_every else 0
    kept = (model.num_layers - recomputed) * per_layer + recomputed * 4 * model.d_model
    kept += per_layer if recomputed else 0  # one block at a time is whole again
    segment, row = recipe.training.segment_tokens, -(-row_tokens // num_parts)
    kept_of_row = kept * min(segment or row, row)
    if segment is not None:  # with the fp32 states between segments
        kept_of_row += row // segment * 4 * model.num_layers * model.d_inner * model.state_size
    return kept_of_row


def room_for_activations(recipe: Recipe, free_bytes: int, shards: int = 1) -> int:
    """Half of what weights, gradients and two moments leave.

    Of a divided model a rank has its part, and all gradients until those of the last micro-batch are summed.
    """
    parameters: int = count_parameters(recipe.model)["total"]
    states = 16 * parameters // shards + (4 * parameters if shards > 1 else 0)
    return max(0, (free_bytes - states) // 2)
