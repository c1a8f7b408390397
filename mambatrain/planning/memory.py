"""Memory of one process at its fullest moment, by part."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mambatrain.models.parameters import conv_channels, parameter_rows
from mambatrain.planning.sharding import gathered_at_once, units_of
from mambatrain.training.eight_bit_adamw import moment_bytes
from mambatrain.training.step_trace import Part, trace_steps

if TYPE_CHECKING:
    from mambatrain.devices import Precision
    from mambatrain.planning.plan import Place
    from mambatrain.recipe import ModelSection, Recipe

# Resident size of a process that has imported what training imports (Python 3.11, torch 2.13 for CPUs, Linux) and
# multiplied its first matrices: tests/long/plan_against_peak.py measures it. What a GPU's context takes was not
# measured.
PROCESS_BYTES_ON_CPU = 478_000_000


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a process at its fullest moment."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What layers keep for the backward pass, and what the one at work takes beside."""
    loss: int
    """Logits of a chunk, gradients of the hidden states and of the head before they are handed on."""
    states: int
    """What row slots go on from, with `data.carry_state`."""
    communication: int
    """DDP's copy of the gradients; of a divided model the units that are gathered, and gradients on their way."""
    saved_copy: int
    """What `checkpoint.asynchronous` writes from; on CPUs alone, as elsewhere it is not in the device's memory."""
    holes: int
    """Freed memory that the C library keeps and nothing fitted into; on CPUs alone."""
    process: int
    """Python and the libraries; on CPUs alone."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def plan_memory(recipe: Recipe, place: Place, rows: int, micro_batch_rows: int) -> MemoryPlan:
    """
    Args:
        recipe: what is trained.
        place: where.
        rows: of a process in a step.
        micro_batch_rows: of them at once.
    """
    from mambatrain.ops.native.selective_scan import keeping_as_on

    num_micro_batches = -(-rows // micro_batch_rows)
    is_sharded = place.shards > 1
    with nullcontext() if place.is_cpu else keeping_as_on("cuda"):
        trace = trace_steps(
            recipe,
            place.backend,
            place.precision,
            micro_batch_rows,
            num_micro_batches,
            is_sharded,
            place.sequence,
        )
    process = PROCESS_BYTES_ON_CPU if place.is_cpu else 0
    if is_sharded:
        own = trace.fullest(without=("weights", "gradients", "optimizer"))
        return _of_a_shard(recipe, place, rows, num_micro_batches, own, process)
    parts = trace.fullest()
    weights = parts["weights"]
    return MemoryPlan(
        weights=weights,
        gradients=parts.get("gradients", 0),
        optimizer=parts.get("optimizer", 0) or optimizer_bytes(recipe, place.precision),  # 8 bits are not traced
        activations=parts.get("activations", 0),
        loss=parts.get("loss", 0),
        states=parts.get("states", 0),
        communication=weights if place.num_devices > 1 else 0,
        saved_copy=saved_copy_bytes(recipe, place, rows) if place.is_cpu else 0,
        holes=max(0, trace.heap_bytes() - sum(parts.values())) if place.is_cpu else 0,
        process=process,
    )


def _of_a_shard(
    recipe: Recipe, place: Place, rows: int, num_micro_batches: int, traced: dict[Part, int], process: int
) -> MemoryPlan:
    """Gradients of all but the last micro-batch are added up undivided: that spares communication, not memory."""
    units = units_of(recipe, place.precision, place.shards)
    width = 8 if place.precision == "fp64" else 4
    shard = sum(unit.shard for unit in units)
    whole = sum(unit.numbers for unit in units)
    largest = max(unit.numbers for unit in units)
    return MemoryPlan(
        weights=shard * width,
        gradients=(shard + (whole if num_micro_batches > 1 else 0)) * width,
        optimizer=optimizer_bytes(recipe, place.precision, place.shards),
        activations=traced["activations"],
        loss=traced.get("loss", 0),
        states=traced.get("states", 0),
        communication=sum(gathered_at_once(units)) + 2 * largest * width,
        saved_copy=saved_copy_bytes(recipe, place, rows) if place.is_cpu else 0,
        holes=0,
        process=process,
    )


def saved_copy_bytes(recipe: Recipe, place: Place, rows: int) -> int:
    """CPU memory that a process keeps for `checkpoint.asynchronous`: what it writes of a checkpoint, once more.

    Of a divided model each process writes its own part; else one process writes all.

    Args:
        recipe, place: what is trained, and where.
        rows: of a process in a step, for the states that they go on from.
    """
    asked = recipe.checkpoint.asynchronous
    if not (not place.is_cpu if asked == "auto" else asked):
        return 0
    written_rows = rows if place.shards > 1 else recipe.rows_per_step
    return checkpoint_bytes(recipe, place.precision, place.shards, written_rows)


def checkpoint_bytes(recipe: Recipe, precision: Precision, shards: int, rows: int) -> int:
    """The tensors of a checkpoint, or of one rank's part of it, with the states of so many rows."""
    width = 8 if precision == "fp64" else 4
    weights = sum(unit.shard for unit in units_of(recipe, precision, shards)) * width
    trained = weights if recipe.optimizer.kind == "schedule_free" else 0  # beside the average, which is the weights
    states = rows * state_bytes(recipe.model, width) if recipe.data.carry_state else 0
    return weights + trained + optimizer_bytes(recipe, precision, shards) + states


def state_bytes(model: ModelSection, bytes_per_number: int) -> int:
    """The state of one row: W - 1 inputs of the convolution and E N numbers in each layer."""
    channels = model.d_inner if model.block == "mamba1" else conv_channels(model)
    numbers = (model.d_conv - 1) * channels + model.d_inner * model.state_size
    return model.num_layers * numbers * bytes_per_number


def optimizer_bytes(recipe: Recipe, precision: Precision, shards: int = 1) -> int:
    """Of one rank: two moments of each parameter, Muon's matrices one; a shard's rows where the model is divided."""
    eight_bit = recipe.optimizer.state_precision == "8bit"
    width = 2 if recipe.optimizer.state_precision == "bf16" else 8 if precision == "fp64" else 4
    total = 0
    for row in parameter_rows(recipe.model).values():
        shape = row.shape(recipe.model)
        moments = 1 if recipe.optimizer.kind == "muon" and row.is_matrix else 2
        numbers = -(-shape[0] // shards) * math.prod(shape[1:])
        total += moments * (moment_bytes(numbers) if eight_bit else numbers * width)
    return total
