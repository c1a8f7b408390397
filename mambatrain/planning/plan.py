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
from mambatrain.planning.memory import MemoryPlan, checkpoint_bytes, plan_memory, saved_copy_bytes
from mambatrain.planning.sharding import Traffic, bytes_sent, traffic_of
from mambatrain.recipe import Recipe
from mambatrain.training.resolve import resolve
from mambatrain.training.sequence import share_of_rank
from mambatrain.training.sharding import refused_with_shards


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
    sequence: int = 1
    """Devices that share each row."""

    @property
    def free_bytes(self) -> int:
        """What a process finds free when it begins, on devices that nothing else uses."""
        return self.device.memory_bytes // (self.num_devices if self.is_cpu else 1)

    @property
    def usable_bytes(self) -> int:
        """What each process may fill; processes on a CPU share its memory."""
        return self.free_bytes if self.is_cpu else int(USABLE_OF_GPU * self.free_bytes)


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
    recompute_every: int
    """Every how many blocks one is computed again; 0: none. What `training.activation_checkpointing` comes to here."""
    memory: MemoryPlan
    """Of each process."""
    host_bytes: int
    """CPU memory that `checkpoint.asynchronous` takes on a machine with a GPU: of each process of a divided model, else
    of the first one."""
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
        UserError: the rows of a step do not divide into the devices, or the recipe trains what is not planned.
    """
    asked = recipe
    _refuse_unplanned(recipe)
    recipe, rows, at_once = settle(recipe, place)
    memory = plan_memory(recipe, place, rows, at_once)
    fits = memory.total <= place.usable_bytes
    traffic = traffic_of(recipe, place.precision, place.num_devices, place.shards, -(-rows // at_once), place.sequence)
    tokens = recipe.total_steps * recipe.tokens_per_step
    flops = training_flops_per_token(recipe.model, recipe.data.row_tokens)
    speed = place.num_devices * place.device.peak_flops(place.precision) * place.utilisation / flops
    parameters = count_parameters(recipe.model)
    return Plan(
        parameters=parameters,
        flops_per_token=flops,
        total_flops=flops * tokens,
        total_tokens=tokens,
        tokens_per_step=recipe.tokens_per_step,
        total_steps=recipe.total_steps,
        micro_batch_rows=at_once,
        micro_batches_per_step=-(-rows // at_once),
        recompute_every=recipe.recompute_every,
        memory=memory,
        host_bytes=0 if place.is_cpu else saved_copy_bytes(recipe, place, rows),
        usable_bytes=place.usable_bytes,
        fits=fits,
        change=None if fits else find_change(asked, place),
        traffic=traffic,
        sent_bytes_per_step=bytes_sent(traffic, place.num_devices, place.shards),
        seconds=tokens / speed,
        tokens_per_second=speed,
        shard_bytes=tokens * token_dtype(recipe.model.vocab_size).itemsize,
        checkpoint_bytes=checkpoint_bytes(recipe, place.precision, 1, recipe.rows_per_step),
        checkpoints_kept=recipe.checkpoint.keep_newest + recipe.checkpoint.keep_best + 1,
    )


def _refuse_unplanned(recipe: Recipe) -> None:
    if recipe.adapter is not None or recipe.parameters.frozen:
        raise UserError(
            "plan counts the training of a whole model, and this recipe trains an adapter or leaves parameters frozen",
            "take those sections out; what is trained then is the most it can cost",
        )
    if recipe.preferences is not None:
        raise UserError(
            "plan counts next-token training, and this recipe learns from preferences", "take preferences out"
        )


def settle(recipe: Recipe, place: Place) -> tuple[Recipe, int, int]:
    """The recipe without `auto`, rows of a process in a step, and at once: as `pretrain` decides where memory is free.

    Raises:
        UserError: the rows of a step do not divide into the devices, or the devices into groups that share rows.
    """
    share = share_of_rank(place.sequence, 0, place.num_devices)
    resolved = resolve(recipe, None, place.precision, place.free_bytes, share, place.shards)
    rows = recipe.rows_per_step // share.num_groups
    return recipe.recomputing(resolved.recompute_every), rows, resolved.micro_batch_rows


def find_change(recipe: Recipe, place: Place) -> str | None:
    """The first change that makes it fit: what costs no time before what does."""
    at_once = settle(recipe, place)[2]
    for words, changed, where in _changes(recipe, place, at_once):
        settled, rows, now_at_once = settle(changed, where)
        if plan_memory(settled, where, rows, now_at_once).total <= place.usable_bytes:
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
    can_shard = place.shards < place.num_devices and place.sequence == 1 and not refused_with_shards(recipe)
    if can_shard:
        yield "--shard full", recipe, sharded
    least = training(activation_checkpointing="every_block", micro_batch_rows=1)
    yield f"{again} --set training.micro_batch_rows=1", least, place
    if can_shard:
        yield f"--shard full {again} --set training.micro_batch_rows=1", least, sharded
