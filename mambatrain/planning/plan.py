"""`mambatrain plan`: what a recipe costs, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from mambatrain.data.token_shards import token_dtype
from mambatrain.devices import Precision
from mambatrain.errors import UserError
from mambatrain.models.flops import count_parameters, training_flops_per_token
from mambatrain.ops.backends import Backend
from mambatrain.planning.hardware import USABLE_OF_GPU, Device
from mambatrain.planning.memory import MemoryPlan, optimizer_bytes, plan_memory
from mambatrain.planning.sharding import Traffic, bytes_sent, traffic_of
from mambatrain.recipe import Recipe
from mambatrain.training.resolve import choose_micro_batch_rows
from mambatrain.training.sharding import settings_refused_with_shards


@dataclass(frozen=True)
class Place:
    """Where a recipe is planned to run."""

    device: Device
    is_cpu: bool
    num_devices: int
    shards: int
    """Devices that share one copy of the model."""
    precision: Precision
    backend: Backend
    utilisation: float
    """Model FLOPs a second over the device's peak: assumed, not measured."""

    @property
    def usable_bytes(self) -> int:
        """What each process may fill; processes on a CPU share its memory."""
        memory = self.device.memory_bytes
        return memory // self.num_devices if self.is_cpu else int(USABLE_OF_GPU * memory)


@dataclass(frozen=True)
class Plan:
    """All that a plan says."""

    parameters: dict[str, int]
    flops_per_token: int
    total_flops: int
    total_tokens: int
    tokens_per_step: int
    total_steps: int
    micro_batch_rows: int
    micro_batches_per_step: int
    """Of each process."""
    memory: MemoryPlan
    """Of each process."""
    usable_bytes: int
    fits: bool
    change: str | None
    """What makes it fit, where it does not; None where nothing here does."""
    traffic: list[Traffic]
    """Of each process in a step."""
    sent_bytes_per_step: int
    """By each process."""
    seconds: float
    tokens_per_second: float
    shard_bytes: int
    """Of the tokens drawn, if each is drawn once."""
    checkpoint_bytes: int
    checkpoints_kept: int
    """At most at once, the one being written included; `checkpoint.keep_every` adds to them."""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def make_plan(recipe: Recipe, place: Place) -> Plan:
    """Plans a recipe; nothing is built, and no data is needed.

    Raises:
        UserError: the rows of a step do not divide into the devices, or the recipe trains an adapter.
    """
    if recipe.adapter is not None or recipe.parameters.frozen:
        raise UserError(
            "plan counts the training of a whole model, and this recipe trains an adapter or leaves parameters frozen",
            "take those sections out; what is trained then is the most it can cost",
        )
    rows = _rows_per_process(recipe, place.num_devices)
    at_once = _rows_at_once(recipe, place, rows)
    memory = plan_memory(recipe, place, rows, at_once)
    fits = memory.total <= place.usable_bytes
    traffic = traffic_of(recipe, place.precision, place.num_devices, place.shards, -(-rows // at_once))
    tokens = recipe.total_steps * recipe.tokens_per_step
    flops = training_flops_per_token(recipe.model, recipe.data.row_tokens)
    speed = place.num_devices * place.device.peak_flops(place.precision) * place.utilisation / flops
    parameters = count_parameters(recipe.model)
    width = 8 if place.precision == "fp64" else 4
    return Plan(
        parameters=parameters,
        flops_per_token=flops,
        total_flops=flops * tokens,
        total_tokens=tokens,
        tokens_per_step=recipe.tokens_per_step,
        total_steps=recipe.total_steps,
        micro_batch_rows=at_once,
        micro_batches_per_step=-(-rows // at_once),
        memory=memory,
        usable_bytes=place.usable_bytes,
        fits=fits,
        change=None if fits else find_change(recipe, place),
        traffic=traffic,
        sent_bytes_per_step=bytes_sent(traffic, place.num_devices, place.shards),
        seconds=tokens / speed,
        tokens_per_second=speed,
        shard_bytes=tokens * token_dtype(recipe.model.vocab_size).itemsize,
        checkpoint_bytes=parameters["total"] * width + optimizer_bytes(recipe, place.precision),
        checkpoints_kept=recipe.checkpoint.keep_newest + recipe.checkpoint.keep_best + 1,
    )


def _rows_per_process(recipe: Recipe, num_devices: int) -> int:
    rows, left = divmod(recipe.rows_per_step, num_devices)
    if left or not rows:
        raise UserError(
            f"{recipe.rows_per_step} rows a step do not divide into {num_devices} devices",
            "--set training.tokens_per_step to a multiple, or plan for another number of devices",
        )
    return rows


def _rows_at_once(recipe: Recipe, place: Place, rows: int) -> int:
    """As `pretrain` takes them on a device whose memory is free."""
    asked = recipe.training.micro_batch_rows
    if asked == "auto":
        asked = choose_micro_batch_rows(recipe, rows, place.device.memory_bytes)
    return min(rows, asked)


def find_change(recipe: Recipe, place: Place) -> str | None:
    """The first change that makes it fit: what costs no time before what does."""
    rows = _rows_per_process(recipe, place.num_devices)
    at_once = _rows_at_once(recipe, place, rows)
    for words, changed, where in _changes(recipe, place, at_once):
        if plan_memory(changed, where, rows, _rows_at_once(changed, where, rows)).total <= place.usable_bytes:
            return words
    return None


def _changes(recipe: Recipe, place: Place, at_once: int) -> Iterator[tuple[str, Recipe, Place]]:
    def training(**settings: Any) -> Recipe:
        return recipe.model_copy(update={"training": recipe.training.model_copy(update=settings)})

    fewer = [rows for rows in range(at_once - 1, 0, -1) if at_once % rows == 0]
    for rows in fewer:
        yield f"--set training.micro_batch_rows={rows}", training(micro_batch_rows=rows), place
    again = "--set training.activation_checkpointing=every_block"
    yield again, training(activation_checkpointing="every_block"), place
    sharded = replace(place, shards=place.num_devices)
    can_divide = place.shards < place.num_devices and not settings_refused_with_shards(recipe)
    if can_divide:
        yield "--shard full", recipe, sharded
    least = training(activation_checkpointing="every_block", micro_batch_rows=1)
    yield f"{again} --set training.micro_batch_rows=1", least, place
    if can_divide:
        yield f"--shard full {again} --set training.micro_batch_rows=1", least, sharded
