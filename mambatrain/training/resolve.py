"""What `auto` in a recipe comes to on this machine: decided once, recorded in the run, kept on every resume."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from mambatrain.devices import Precision, available_memory_bytes, resolve_precision
from mambatrain.errors import UserError
from mambatrain.models.flops import count_parameters
from mambatrain.recipe import Recipe
from mambatrain.runs.folder import RunFolder
from mambatrain.runs.weights import Weights
from mambatrain.training.sequence import RowShare


@dataclass(frozen=True)
class Resolved:
    """What `auto` came to on the first start of a run; kept on every resume."""

    precision: Precision
    micro_batch_rows: int


def resolve(recipe: Recipe, folder: RunFolder, device: torch.device, share: RowShare, fresh: bool) -> Resolved:
    """Precision and micro-batch: as recorded in the run, or chosen now."""
    rows = recipe.rows_per_step // share.num_groups
    if rows * share.num_groups != recipe.rows_per_step:
        raise UserError(
            f"{recipe.rows_per_step} rows a step do not divide into {share.all_ranks}",
            "--set training.rows_per_step to a multiple, or start another number of processes",
        )
    for stage in recipe.stages:
        if stage.rows_per_step % share.num_groups:
            raise UserError(
                f"{stage.rows_per_step} rows of {stage.row_tokens} tokens a step, from step {stage.first_draw + 1:,} "
                f"on, do not divide into {share.all_ranks}",
                "--set training.tokens_per_step to a multiple, or start another number of processes",
            )
    if not fresh:
        facts = read_facts(folder)
        return Resolved(facts["precision"], min(rows, int(facts["micro_batch_rows"])))
    precision = resolve_precision(recipe.training.precision, device)
    asked = recipe.training.micro_batch_rows
    if asked == "auto":
        asked = choose_micro_batch_rows(recipe, rows, available_memory_bytes(device), share.num_parts)
    return Resolved(precision, min(rows, asked))


def read_facts(folder: RunFolder) -> dict[str, Any]:
    """What run.json recorded.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        facts: dict[str, Any] = json.loads(folder.facts_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder.facts_file} cannot be read: {error}", "restore it, or begin again with --fresh"
        ) from None
    return facts


def refuse_changed_origin(folder: RunFolder, facts: dict[str, Any], data_digest: str, weights: Weights | None) -> None:
    """A run goes on with the data and from the weights that it began with.

    Args:
        folder: for the message.
        facts: run.json of the run, or of the one that it branches from.
        data_digest, weights: what there is now.

    Raises:
        UserError: another digest than run.json recorded.
    """
    began_from = facts["started_from"]
    changed = {
        "the tokens of its data folder": (facts["data_digest"], data_digest),
        "the weights it starts from": (began_from and began_from["digest"], weights and weights.digest),
    }
    for what, (before, now) in changed.items():
        if before != now:
            raise UserError(
                f"{folder.path} cannot go on: {what} changed since it began\n  began with {before}\n  now        {now}",
                "bring back what it began with, or begin again with --fresh",
            )


def choose_micro_batch_rows(recipe: Recipe, rows: int, free_bytes: int, num_parts: int = 1) -> int:
    """The largest divisor of a rank's rows whose activations fill at most half of the memory that is free.

    Per token and layer about 40 d_model + 20 E bytes are kept for the backward pass in mixed precision, twice that in
    fp32; with activation checkpointing the block's input alone (4 d_model). An estimate on the safe side. A rank has
    one of the `num_parts` parts of each row.
    """
    model = recipe.model
    per_layer = 2 * (40 * model.d_model + 20 * model.d_inner)
    recomputed = model.num_layers // recipe.recompute_every if recipe.recompute_every else 0
    kept = (model.num_layers - recomputed) * per_layer + recomputed * 4 * model.d_model
    kept += per_layer if recomputed else 0  # one block at a time is whole again
    states = 16 * count_parameters(model)["total"]  # weights, gradients, two moments
    room = max(0.0, 0.5 * (free_bytes - states))
    segment, row = recipe.training.segment_tokens, -(-recipe.data.row_tokens // num_parts)
    kept_of_row = kept * min(segment or row, row)
    if segment is not None:  # with the fp32 states between segments
        kept_of_row += row // segment * 4 * model.num_layers * model.d_inner * model.state_size
    fitting = int(room // kept_of_row)
    return next((n for n in range(min(rows, max(1, fitting)), 0, -1) if rows % n == 0), 1)
