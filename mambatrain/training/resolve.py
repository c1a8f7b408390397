"""What `auto` in a recipe comes to on this machine: decided once, recorded in the run, kept on every resume."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from mambatrain.devices import Precision, available_memory_bytes, from_all_processes, resolve_precision
from mambatrain.errors import UserError
from mambatrain.launch import num_processes_here
from mambatrain.recipe import Recipe
from mambatrain.runs.folder import RunFolder
from mambatrain.runs.weights import Weights
from mambatrain.training.fitting import choose_micro_batch_rows, choose_recompute_every
from mambatrain.training.sequence import RowShare

Facts = dict[str, Any]
"""run.json."""


@dataclass(frozen=True)
class Resolved:
    """What `auto` came to on the first start of a run; kept on every resume, and the same on every rank."""

    precision: Precision
    micro_batch_rows: int
    recompute_every: int
    """Every how many blocks one keeps its input only; 0: none does."""
    recompute_chosen: bool
    """Whether that is what `auto` came to: what a recipe says outright is not kept where a branch says otherwise."""


def resolve(
    recipe: Recipe, recorded: Facts | None, precision: Precision, free_bytes: int, share: RowShare, shards: int
) -> Resolved:
    """Rows at once and blocks computed again: as recorded in the run, or chosen now.

    Args:
        recipe: of the run.
        recorded: its run.json; None: it begins.
        precision: decided before, as processes join in it.
        free_bytes: of the rank that has least.
        share, shards: how many ranks share a row, and a copy of the model.

    Raises:
        UserError: the rows of a step do not divide into the ranks.
    """
    rows = rows_of_group(recipe, share)
    training, kept = recipe.training, recorded or {}
    known = int(kept["micro_batch_rows"]) if recorded is not None else training.micro_batch_rows
    recompute = training.activation_checkpointing
    is_asked = recompute == "auto"
    if is_asked and kept.get("recompute_chosen", False):
        recompute_every = int(kept["recompute_every"])
    elif is_asked:
        at_once = 1 if known == "auto" else min(rows, known)
        recompute_every = choose_recompute_every(recipe, at_once, free_bytes, share.num_parts, shards)
    else:
        recompute_every = recipe.recompute_every
    if known == "auto":
        settled = recipe.recomputing(recompute_every)
        known = choose_micro_batch_rows(settled, rows, free_bytes, share.num_parts, shards)
    return Resolved(precision, min(rows, known), recompute_every, is_asked)


def rows_of_group(recipe: Recipe, share: RowShare) -> int:
    """Rows of a step that one group of ranks has.

    Raises:
        UserError: they do not divide into the ranks.
    """
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
    return rows


def decide_precision(recipe: Recipe, recorded: Facts | None, device: torch.device) -> Precision:
    """As recorded, or what `auto` is on this device."""
    if recorded is not None:
        precision: Precision = recorded["precision"]
        return precision
    return resolve_precision(recipe.training.precision, device)


def resolve_together(
    recipe: Recipe, recorded: Facts | None, precision: Precision, device: torch.device, share: RowShare, shards: int
) -> Resolved:
    """`resolve` with what all ranks know: the least memory of any, and what rank 0 has read of the run.

    Ranks that took other numbers of rows at once would wait for each other for ever.

    Raises:
        UserError: `auto` is not the same precision on all of them, or the rows do not divide.
    """
    everyone = from_all_processes((precision, memory_of_process(device), recorded))
    if len(precisions := sorted({one[0] for one in everyone})) > 1:
        raise UserError(
            f"training.precision is {' on some processes and '.join(precisions)} on others",
            f"say which: --set training.precision={precisions[-1]}",
        )
    return resolve(recipe, everyone[0][2], precision, min(one[1] for one in everyone), share, shards)


def memory_of_process(device: torch.device) -> int:
    """Bytes that are free for this process; processes on a CPU share what the machine has."""
    free = available_memory_bytes(device)
    return free // num_processes_here() if device.type == "cpu" else free


def read_facts(folder: RunFolder) -> Facts:
    """What run.json recorded.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        facts: Facts = json.loads(folder.facts_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder.facts_file} cannot be read: {error}", "restore it, or begin again with --fresh"
        ) from None
    return facts


def refuse_changed_origin(folder: RunFolder, facts: Facts, data_digest: str, weights: Weights | None) -> None:
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
