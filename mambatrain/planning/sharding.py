"""What dividing a model over ranks comes to, by formula: a rank's part of the weights, and what travels in a step.

`dry_run.py` builds the divided model on fake ranks and counts the same; tests/unit/planning/test_dry_run.py compares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mambatrain.devices import Precision
from mambatrain.models.parameters import parameter_rows
from mambatrain.models.sequence_parallel import bytes_sent as bytes_to_neighbours
from mambatrain.recipe import Recipe

FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together, as `training/sharding.py` groups them."""

    numbers: int
    """Of all ranks of a group together, with the padding that makes their shards equal."""
    shard: int
    """Of one rank."""
    gathered_bytes: int
    """Of the whole unit, in the precision in which it travels and is computed with."""
    is_root: bool
    """The embedding's: it stays gathered from forward to backward."""


def units_of(recipe: Recipe, precision: Precision, shards: int) -> list[Unit]:
    """The units of the divided model, the root's last."""
    rows = parameter_rows(recipe.model)
    width = 8 if precision == "fp64" else FP32

    def unit(names: list[str], each: int, is_root: bool = False) -> Unit:
        shapes = [rows[name].shape(recipe.model) for name in names]
        shard = sum(-(-shape[0] // shards) * math.prod(shape[1:]) for shape in shapes)
        return Unit(shard * shards, shard, shard * shards * each, is_root)

    units = []
    for layer in range(recipe.model.num_layers):
        names = [name for name in rows if name.startswith(f"layers.{layer}.")]
        narrow = [name for name in names if precision == "bf16" and _is_narrow(name, names, recipe)]
        if narrow:
            units.append(unit(narrow, BF16))
        units.append(unit([name for name in names if name not in narrow], width))
    return [*units, unit([name for name in rows if not name.startswith("layers.")], width, is_root=True)]


def _is_narrow(name: str, names: list[str], recipe: Recipe) -> bool:
    """Whether it belongs to a matrix of which nothing must stay fp32."""
    rows = parameter_rows(recipe.model)
    module = name.rpartition(".")[0]
    beside = [other for other in names if other.rpartition(".")[0] == module]
    return module.endswith("_proj") and not any(rows[other].keeps_fp32 for other in beside)


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in one step of one rank."""

    kind: str
    count: int
    num_bytes: int
    """Of the whole tensor that all ranks of the group have together."""


STATES = "states"
"""Traffic between ranks that share rows, in place of a collective."""


def traffic_of(
    recipe: Recipe, precision: Precision, num_devices: int, shards: int, num_micro_batches: int, num_parts: int = 1
) -> list[Traffic]:
    """What a rank takes part in during one step, the few scalars left out.

    A divided model: in each micro-batch each unit is gathered for forward and again for backward, the root's once, and
    with activation checkpointing no more often. In the last micro-batch gradients are summed and scattered in the
    precision of the weights, and, where several groups hold the model, the shards are summed over the groups.
    Copies (DDP): gradients are summed once. Ranks that share rows: each layer's state to the right and its gradient to
    the left, of a rank that has both neighbours where there are three.
    """
    units = units_of(recipe, precision, shards)
    width = 8 if precision == "fp64" else FP32
    if shards == 1:
        whole = sum(unit.numbers for unit in units) * width
        summed = [Traffic("all-reduce", 0, whole)] if num_devices > 1 else []
        return summed + _states_sent(recipe, width, num_devices, num_micro_batches, num_parts)
    gathers = [(1 if unit.is_root else 2) * num_micro_batches for unit in units]
    traffic = [
        Traffic("all-gather", sum(gathers), sum(n * one.gathered_bytes for n, one in zip(gathers, units, strict=True))),
        Traffic("reduce-scatter", len(units), sum(unit.numbers for unit in units) * width),
    ]
    if num_devices > shards:
        traffic.append(Traffic("all-reduce", len(units), sum(unit.shard for unit in units) * width))
    return traffic


def _states_sent(recipe: Recipe, width: int, num_devices: int, num_micro_batches: int, num_parts: int) -> list[Traffic]:
    if num_parts == 1:
        return []
    part = 1 if num_parts > 2 else 0
    rows = recipe.rows_per_step * num_parts // num_devices
    messages = num_micro_batches * recipe.model.num_layers * (1 + part)
    return [Traffic(STATES, messages, bytes_to_neighbours(recipe.model, rows, part, num_parts, width))]


def bytes_sent(traffic: list[Traffic], num_devices: int, shards: int) -> int:
    """What each rank sends in a step with ring algorithms: (n - 1) / n of the tensor, twice that to sum for all."""

    def share(one: Traffic) -> float:
        if one.kind == STATES:
            return 1.0
        if one.kind == "all-reduce":
            ranks = num_devices // shards
            return 2 * (ranks - 1) / ranks
        return (shards - 1) / shards

    return int(sum(share(one) * one.num_bytes for one in traffic))


def gathered_at_once(units: list[Unit]) -> Iterator[int]:
    """Bytes of the units that are whole at the fullest moment: the root's, and the two largest neighbours."""
    yield from (unit.gathered_bytes for unit in units if unit.is_root)
    layers = [unit.gathered_bytes for unit in units if not unit.is_root]
    yield from sorted(layers)[-2:]
