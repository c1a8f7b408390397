"""From a recipe and a run folder to everything the loop works on."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import mambatrain
from mambatrain.adapters.attach import describe_adapter, frozen_digest
from mambatrain.chats.open_chats import open_chats
from mambatrain.data.document_rows import DocumentRows
from mambatrain.data.document_streams import DocumentStreams
from mambatrain.data.packing import PackedWindows
from mambatrain.data.pair_rows import PairRows
from mambatrain.data.tokenizer import tokens_behind
from mambatrain.data.training_data import TrainingData, open_training_data
from mambatrain.devices import (
    DeviceName,
    choose_device,
    keep_freed_memory,
    measure_peak_flops,
    start_accelerator,
)
from mambatrain.errors import UserError
from mambatrain.files import explaining_full_disk, write_json_whole
from mambatrain.launch import RANK_TIMEOUT_SECONDS, num_processes_expected, rank_of_process
from mambatrain.models.flops import count_parameters, training_flops_per_token
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
from mambatrain.training.metrics import LiveLine, RunReporter, WandbTracker, print_fact
from mambatrain.training.name_patterns import freeze_parameters, rates_of
from mambatrain.training.optimizer import build_optimizers, restore_optimizer
from mambatrain.training.rank_watch import RankWatch, wait_without_end
from mambatrain.training.references import give_references
from mambatrain.training.resolve import Resolved, resolve
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
        UserError: data, tokenizer, weights and recipe do not fit each other, or a kernel cannot run or is wrong.
    """
    shards = num_shards(where.shard, accelerator.num_processes)
    if shards > 1:
        refuse_with_shards(recipe, where.shard)
    if where.sequence > 1:
        refuse_with_sequence(recipe, where.sequence, shards, where.kernels)
    row_share = share_of_rank(where.sequence, accelerator.process_index, accelerator.num_processes)
    rates_of(recipe.parameters, list(parameter_shapes(recipe.model)))  # refuses patterns that fit nothing
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
        recipe,
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
            _print_facts(recipe, folder, facts, parts.backend, progress, data)
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


def describe_run(recipe: Recipe, parts: Parts) -> dict[str, Any]:
    """run.json: where a run runs and what it came from."""
    device, weights = parts.accelerator.device, parts.weights
    peak_flops, peak_source = measure_peak_flops(device, parts.resolved.precision)
    return {
        "mambatrain": mambatrain.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": _device_name(device),
        "num_processes": parts.accelerator.num_processes,
        "shards": parts.shards,
        "sequence": parts.row_share.num_parts,
        **asdict(parts.resolved),
        "kernels": {
            "backend": parts.backend.name,
            "reason": parts.backend.reason,
            "self_check": asdict(parts.check) | {"passed": parts.check.passed},
        },
        "parameters": count_parameters(recipe.model),
        "peak_flops": peak_flops,
        "peak_flops_source": peak_source,
        "data_digest": parts.data.digest,
        "started_from": None if weights is None else {"origin": weights.origin, "digest": weights.digest},
    }


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
    """Device, precision and processes of this run."""
    device = choose_device(where.device)
    if device.type == "cpu":
        keep_freed_memory()
    share = share_of_rank(where.sequence, rank_of_process(), num_processes_expected())
    resolved = resolve(recipe, folder, device, share, fresh)
    return start_accelerator(device, resolved.precision, where.rank_timeout), resolved


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def describe_data(recipe: Recipe, data: TrainingData) -> list[str]:
    """What a run draws from, a line each stage, and what it is measured on."""
    lines = []
    for stage, drawn in zip(recipe.stages, data.order.stages, strict=True):
        shares = data.order.shares_of(stage.first_draw)
        named = [f"{share:.1%} {name}" if len(shares) > 1 else name for name, share in shares.items()]
        begins = f"from step {stage.first_draw + 1:,}: " if stage.first_draw else ""
        packed = "packed " if all(isinstance(one.windows, PackedWindows) for one in drawn.sources) else ""
        lines.append(f"{begins}{', '.join(named)}, {packed}rows of {drawn.row_tokens}")
        for source in drawn.sources:
            if isinstance(source.windows, DocumentRows):
                rows = source.windows
                lines.append(f"{source.name}: {rows.num_windows:,} documents, {rows.num_cut:,} of them cut to a row")
            if isinstance(source.windows, DocumentStreams):
                num_documents = source.windows.num_documents
                lines.append(f"{source.name}: {num_documents:,} documents, followed by {drawn.rows_per_step} row slots")
    if data.held_out is not None and isinstance(data.held_out.windows, PairRows):
        lines[0] += f", a pair in each, {data.held_out.windows.num_windows:,} pairs held out"
    elif data.held_out is None:
        lines[0] += ", nothing held out"
    else:
        lines[0] += f", {data.held_out.num_targets:,} tokens held out"
        if data.held_out.num_bytes is None:
            lines.append("bits per byte is not available: nothing says how many bytes the held-out text has")
    return lines


def _print_facts(
    recipe: Recipe,
    folder: RunFolder,
    facts: dict[str, Any],
    backend: Backend,
    progress: Progress,
    data: TrainingData,
) -> None:
    print_fact("run", str(folder.path) + (f", resumed at step {progress.step:,}" if progress.draw else ""))
    print_fact("model", f"{recipe.model.block}, {facts['parameters']['total']:,} parameters")
    for line in describe_data(recipe, data):
        print_fact("data", line)
    processes = "1 process" if facts["num_processes"] == 1 else f"{facts['num_processes']} processes"
    if facts["shards"] > 1:
        processes += f", {facts['shards']} share a copy of the model,"
    if facts["sequence"] > 1:
        processes += f", {facts['sequence']} share each row,"
    print_fact(
        "training",
        f"{recipe.total_steps:,} steps of {recipe.tokens_per_step:,} tokens, {facts['precision']}, "
        f"micro-batches of {facts['micro_batch_rows']} rows, {processes} on {facts['device']}",
    )
    print_fact("kernels", f"{backend.name}: {backend.reason}")
