"""What `auto` in a recipe comes to on this machine: decided once, recorded in the run, kept on every resume."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from mambatrain.devices import Precision, available_memory_bytes, resolve_precision
from mambatrain.errors import UserError
from mambatrain.models.flops import count_parameters
from mambatrain.recipe import Recipe
from mambatrain.runs.folder import RunFolder


@dataclass(frozen=True)
class Resolved:
    """What `auto` came to on the first start of a run; kept on every resume."""

    precision: Precision
    micro_batch_rows: int


def resolve(recipe: Recipe, folder: RunFolder, device: torch.device, num_processes: int, fresh: bool) -> Resolved:
    """Precision and micro-batch: as recorded in the run, or chosen now."""
    if not fresh and folder.facts_file.is_file():
        facts = json.loads(folder.facts_file.read_text(encoding="utf-8"))
        return Resolved(facts["precision"], int(facts["micro_batch_rows"]))
    precision = resolve_precision(recipe.training.precision, device)
    asked = recipe.training.micro_batch_rows
    rows = recipe.rows_per_step // num_processes
    if rows * num_processes != recipe.rows_per_step:
        raise UserError(
            f"{recipe.rows_per_step} rows a step do not divide into {num_processes} processes",
            "--set training.rows_per_step to a multiple, or start another number of processes",
        )
    return Resolved(precision, min(rows, choose_micro_batch_rows(recipe, rows, device) if asked == "auto" else asked))


def choose_micro_batch_rows(recipe: Recipe, rows: int, device: torch.device) -> int:
    """The largest divisor of a rank's rows whose activations fill at most half of the memory that is free.

    Per token and layer about 40 d_model + 20 E bytes are kept for the backward pass in mixed precision, twice that in
    fp32; with activation checkpointing the block's input alone (4 d_model). An estimate on the safe side.
    """
    model = recipe.model
    per_layer = 2 * (40 * model.d_model + 20 * model.d_inner)
    if recipe.training.activation_checkpointing == "every_block":
        kept = model.num_layers * 4 * model.d_model + per_layer
    else:
        kept = model.num_layers * per_layer
    states = 16 * count_parameters(model)["total"]  # weights, gradients, two moments
    room = max(0.0, 0.5 * (available_memory_bytes(device) - states))
    fitting = int(room // (kept * recipe.data.row_tokens))
    return next((n for n in range(min(rows, max(1, fitting)), 0, -1) if rows % n == 0), 1)
