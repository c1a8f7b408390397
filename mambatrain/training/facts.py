"""What a run says of itself before its first step: run.json, and the lines on the screen."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

import mambatrain
from mambatrain.data.document_rows import DocumentRows
from mambatrain.data.document_streams import DocumentStreams
from mambatrain.data.packing import PackedWindows
from mambatrain.data.pair_rows import PairRows
from mambatrain.data.training_data import TrainingData
from mambatrain.devices import measure_peak_flops
from mambatrain.models.flops import count_parameters
from mambatrain.ops.backends import Backend
from mambatrain.recipe import Recipe
from mambatrain.runs.folder import RunFolder
from mambatrain.runs.progress import Progress
from mambatrain.training.metrics import print_fact

if TYPE_CHECKING:
    from mambatrain.training.assemble import Parts


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


def describe_recomputing(every: int, num_layers: int) -> str:
    """Which blocks are computed again in the backward pass, in words."""
    if not every:
        return "no block is computed again in the backward pass"
    which = "every block" if every == 1 else f"one block in {every}"
    return f"{which} is computed again in the backward pass, {num_layers // every} of {num_layers}"


def print_facts(
    recipe: Recipe,
    folder: RunFolder,
    facts: dict[str, Any],
    backend: Backend,
    progress: Progress,
    data: TrainingData,
) -> None:
    """The first lines on the screen: what is trained, on what, where."""
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
    if facts["recompute_chosen"] or facts["recompute_every"]:
        chosen = " (auto)" if facts["recompute_chosen"] else ""
        print_fact("memory", describe_recomputing(facts["recompute_every"], recipe.model.num_layers) + chosen)
    print_fact("kernels", f"{backend.name}: {backend.reason}")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
