"""From a recipe and a run folder to everything the loop works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mambatrain.adapters.attach import describe_adapter, frozen_digest
from mambatrain.adapters.initial_state import read_start
from mambatrain.chats.open_chats import open_chats
from mambatrain.data.tokenizer import tokens_behind
from mambatrain.data.training_data import TrainingData, open_training_data
from mambatrain.devices import (
    DeviceName,
    choose_device,
    keep_freed_memory,
    start_accelerator,
)
from mambatrain.errors import UserError
from mambatrain.files import explaining_full_disk, write_json_whole
from mambatrain.launch import RANK_TIMEOUT_SECONDS, num_processes_expected, rank_of_process
from mambatrain.models.flops import training_flops_per_token
from mambatrain.models.parameters import parameter_shapes
from mambatrain.ops.backends import Backend, choose_backend
from mambatrain.ops.self_check import SelfCheck, check_backend
from mambatrain.recipe import Recipe
from mambatrain.runs.checkpoint import read_progress
from mambatrain.runs.checkpoint_tensors import read_into
from mambatrain.runs.folder import RunFolder
from mambatrain.runs.progress import Progress
from mambatrain.runs.weights import Weights
from mambatrain.training.build import build_objective, parameter_dtype
from mambatrain.training.carried import empty_states, restore_states
from mambatrain.training.eight_bit_adamw import refuse_eight_bit
from mambatrain.training.facts import describe_run, print_facts
from mambatrain.training.metrics import LiveLine, RunReporter, WandbTracker, print_fact
from mambatrain.training.name_patterns import freeze_parameters, rates_of
from mambatrain.training.optimizer import build_optimizers, restore_optimizer
from mambatrain.training.rank_watch import RankWatch, wait_without_end
from mambatrain.training.references import give_references
from mambatrain.training.resolve import Resolved, decide_precision, read_facts, resolve_together, rows_of_group
from mambatrain.training.sequence import RowShare, join_neighbours, refuse_with_sequence, share_of_rank
from mambatrain.training.sharding import num_shards, refuse_with_shards
from mambatrain.training.training_run import TrainingRun

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Where:
    """Where a run runs: said on the command line, never in the recipe."""

    device: DeviceName = "auto"
    kernels: str = "auto"
    tracker: Literal["none", "wandb"] = "none"
    quiet: bool = False
    shard: str = "no"
    """How many ranks share one copy of the model: `no`, `full`, `node`, or a number."""
    sequence: int = 1
    """How many neighbouring ranks share each row."""
    rank_timeout: float = RANK_TIMEOUT_SECONDS
    """Seconds without a movement of any rank after which the one that hangs is named and all end."""


@dataclass(frozen=True)
class Parts:
    """What is decided before a file of the run is written."""

    accelerator: Accelerator
    resolved: Resolved
    data: TrainingData
    backend: Backend
    check: SelfCheck
    weights: Weights | None
    shards: int
    """Ranks that share one copy of the model; 1: each has its own."""
    row_share: RowShare


def choose_parts(
    recipe: Recipe,
    folder: RunFolder,
    origin: RunFolder,
    where: Where,
    accelerator: Accelerator,
    resolved: Resolved,
    weights: Weights | None,
) -> Parts:
    """Opens the data (conversations are tokenized into the run's folder), chooses the kernels and lets them prove
    themselves.

    Raises:
        UserError: data, tokenizer, weights and recipe do not fit each other or the device, or a kernel cannot run or is
            wrong.
    """
    refuse_eight_bit(recipe, accelerator.device)
    shards = num_shards(where.shard, accelerator.num_processes)
    if shards > 1:
        refuse_with_shards(recipe, where.shard)
    if where.sequence > 1:
        refuse_with_sequence(recipe, where.sequence, shards, where.kernels)
    row_share = share_of_rank(where.sequence, accelerator.process_index, accelerator.num_processes)
    rates_of(recipe.parameters, list(parameter_shapes(recipe.model)))  # refuses patterns that fit nothing
    if recipe.adapter is not None and weights is not None:
        read_start(recipe.adapter, weights)  # refuses a state of other weights
    if recipe.data.chats is not None:
        if accelerator.is_main_process:
            known = origin.tokenizer_file if origin.tokenizer_file.is_file() else None
            open_chats(recipe, known if weights is None else weights.tokenizer_file, folder.chats)
        accelerator.wait_for_everyone()
    data = open_data(recipe, weights, folder, may_write=accelerator.is_main_process)
    if accelerator.is_main_process:
        data.verify()
    backend = choose_backend(where.kernels, accelerator.device, parameter_dtype(resolved.precision))
    check = check_backend(backend, recipe.model.block, accelerator.device)
    return Parts(accelerator, resolved, data, backend, check, weights, shards, row_share)


def assemble(
    recipe: Recipe, folder: RunFolder, where: Where, parts: Parts, checkpoint: Path | None, watch: RankWatch
) -> TrainingRun:
    """Builds model, optimizer, data and reporter, restored from a checkpoint where there is one.

    Args:
        recipe: what is trained.
        folder: the run's folder, locked by rank 0 and brought to the moment of the checkpoint.
        where: tracker and loudness.
        parts: what was decided before.
        checkpoint: what to resume from; without one a run starts from `parts.weights`, or from the initialisation of
            the parameter table.
        watch: over this run's ranks.
    """
    accelerator, resolved, data = parts.accelerator, parts.resolved, parts.data
    if recipe.preferences is not None:
        give_references(recipe, parts, folder, where.quiet)
    objective, trained = build_objective(
        recipe.recomputing(resolved.recompute_every),
        parts.backend,
        accelerator.device,
        resolved.precision,
        parts.weights,
        parts.shards,
        begins=checkpoint is None,
    )
    join_neighbours(objective.model, accelerator.process_index, parts.row_share.num_parts)
    if recipe.adapter is None:
        freeze_parameters(objective.model, recipe.parameters)
    optimizers = build_optimizers(trained, recipe.optimizer, recipe.parameters)
    progress = Progress()
    slots = recipe.rows_per_step // accelerator.num_processes
    carried = empty_states(objective.model, slots) if recipe.data.carry_state else None
    if checkpoint is not None:
        carried = None if carried is None else restore_states(checkpoint, carried)
        restore_optimizer(optimizers, trained, read_into(checkpoint, trained.parameters))
        progress = read_progress(checkpoint)
    facts = describe_run(recipe, parts)
    tracker = None
    if accelerator.is_main_process:
        with explaining_full_disk(str(folder.facts_file)):
            write_json_whole(folder.facts_file, facts)
        if where.tracker == "wandb":
            tracker = WandbTracker(folder, recipe.model_dump(mode="json"))
            print_fact("wandb", tracker.where)
        if not where.quiet:
            print_facts(recipe, folder, facts, parts.backend, progress, data)
            if recipe.adapter is not None:
                for line in describe_adapter(recipe.adapter, recipe.model, trained):
                    print_fact("adapter", line)
    quiet = where.quiet or not accelerator.is_main_process
    live = LiveLine(recipe.total_steps, progress.step, quiet)
    run = TrainingRun(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        objective=objective,
        prepared=objective if parts.shards > 1 else accelerator.prepare(objective),  # DDP where there are several
        trained=trained,
        frozen_sha256=None if recipe.adapter is None else frozen_digest(objective.model),
        optimizers=optimizers,
        order=data.order,
        held_out=data.held_out,
        row_share=parts.row_share,
        micro_batch_rows=resolved.micro_batch_rows,
        carried=carried,
        progress=progress,
        reporter=RunReporter(folder, live, tracker, writes=accelerator.is_main_process),
        watch=watch,
        flops_per_token=training_flops_per_token(recipe.model, recipe.data.longest_row_tokens),
        peak_flops=facts["peak_flops"],
    )
    wait_without_end()  # groups of the model's division have come
    return run


def open_data(recipe: Recipe, weights: Weights | None, folder: RunFolder, may_write: bool) -> TrainingData:
    """The recipe's tokens, checked against the model and against the tokenizer of the starting weights."""
    data = open_training_data(recipe, may_write, folder.chats)
    if (
        weights is not None
        and weights.tokenizer_file is not None
        and data.tokenizer_file is not None
        and tokens_behind(weights.tokenizer_file, data.tokenizer_file) is None
    ):
        raise UserError(
            f"{', '.join(data.sources)} was tokenized with another tokenizer than that of {weights.origin}",
            f"tokenize the text again with --tokenizer {weights.tokenizer_file}",
        )
    return data


def start_processes(recipe: Recipe, folder: RunFolder, where: Where, fresh: bool) -> tuple[Accelerator, Resolved]:
    """Device and processes of this run, and what `auto` in its recipe is on all of them."""
    device = choose_device(where.device)
    if device.type == "cpu":
        keep_freed_memory()
    share = share_of_rank(where.sequence, rank_of_process(), num_processes_expected())
    rows_of_group(recipe, share)  # refused before the others are waited for
    recorded = None if fresh else read_facts(folder)
    precision = decide_precision(recipe, recorded, device)
    accelerator = start_accelerator(device, precision, where.rank_timeout)
    shards = num_shards(where.shard, accelerator.num_processes)
    return accelerator, resolve_together(recipe, recorded, precision, accelerator.device, share, shards)
