"""What a plan says, for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from mambatrain.cli.run_tables import format_bytes

if TYPE_CHECKING:
    from mambatrain.planning.dry_run import DryRun
    from mambatrain.planning.plan import Place, Plan
    from mambatrain.recipe import Recipe

NOTHING_FITS = "no setting of the plan's makes it fit: more devices with --shard full, larger ones, or a smaller model"
_UNITS = (("days", 86_400), ("hours", 3_600), ("minutes", 60))
_MEANINGS = {
    "weights": "",
    "gradients": "",
    "optimizer": "",
    "activations": "kept for the backward pass; training.micro_batch_rows, training.activation_checkpointing",
    "loss": "logits of a chunk, and the gradients made of them",
    "communication": "gathered weights, and gradients on their way",
    "states": "of the row slots, which go on from them; data.carry_state",
    "saved_copy": "what is written while training goes on; checkpoint.asynchronous",
    "holes": "freed, kept by the C library, and nothing fitted into it",
    "process": "Python and its libraries",
}


def plan_lines(name: str, recipe: Recipe, place: Place, plan: Plan) -> Iterator[str]:
    """A plan in words and columns."""
    from mambatrain.training.facts import describe_recomputing

    shared = f", {place.shards} share a copy of the model" if place.shards > 1 else ""
    shared += f", {place.sequence} share each row" if place.sequence > 1 else ""
    yield f"{name} on {place.num_devices:,} x {place.device.name}{shared}"
    yield f"{place.precision}, kernels {place.backend.name}: {place.backend.reason}"
    yield ""
    yield "parameters"
    for part, count in plan.parameters.items():
        if count:
            yield f"  {'in all' if part == 'total' else part:<15}{count:>16,}"
    yield ""
    yield "training"
    yield f"  {plan.total_steps:,} steps of {plan.tokens_per_step:,} tokens: {plan.total_tokens:,} tokens"
    rows = (
        f"{plan.micro_batches_per_step:,} x {plan.micro_batch_rows:,} rows of {recipe.data.row_tokens:,} tokens a step"
    )
    if place.sequence == 1:
        yield f"  each process: {rows}"
    else:
        length = -(-recipe.data.row_tokens // place.sequence)
        yield f"  each group of {place.sequence} processes: {rows}, of which each has {length:,} tokens of a row"
    if recipe.training.activation_checkpointing == "auto" or plan.recompute_every:
        yield f"  {describe_recomputing(plan.recompute_every, recipe.model.num_layers)}"
    yield f"  {plan.flops_per_token:.3e} FLOPs a token, {plan.total_flops:.3e} in all"
    yield (
        f"  {format_seconds(plan.seconds)} if {place.utilisation:.0%} of the peak is reached (an assumption: "
        f"--utilisation), {plan.tokens_per_second:,.0f} tokens/s"
    )
    yield ""
    yield "memory of each process at its fullest"
    for part, count in asdict(plan.memory).items():
        if count:
            yield f"  {part:<15}{format_bytes(count):>12}  {_MEANINGS[part]}".rstrip()
    yield f"  {'in all':<15}{format_bytes(plan.memory.total):>12}"
    if plan.host_bytes:
        of = "each process" if place.shards > 1 else "the first process"
        yield f"  and {format_bytes(plan.host_bytes)} of CPU memory of {of}: {_MEANINGS['saved_copy']}"
    yield ""
    if plan.traffic:
        yield "between processes, in each step"
        for one in plan.traffic:
            times = f"{one.count:>6,} times" if one.count else "in buckets"
            times += " to neighbours" if one.kind == "states" else ""
            yield f"  {one.kind:<15}{format_bytes(one.num_bytes):>12}  {times}"
        yield f"  {'sent by each':<15}{format_bytes(plan.sent_bytes_per_step):>12}"
        yield ""
    yield "disk"
    yield f"  {'tokens':<15}{format_bytes(plan.shard_bytes):>12}  if each is drawn once"
    kept, each = plan.checkpoints_kept, plan.checkpoint_bytes
    yield f"  {'checkpoints':<15}{format_bytes(kept * each):>12}  at most {kept} of {format_bytes(each)}"
    yield ""
    usable, total = format_bytes(plan.usable_bytes), format_bytes(plan.memory.total)
    if plan.fits:
        yield f"It fits: {total} of {usable} that a process may fill."
    else:
        yield f"It does not fit: {total}, and a process may fill {usable}."
        yield f"Change: {plan.change or NOTHING_FITS}"


def dry_run_lines(counted: DryRun) -> Iterator[str]:
    """What one rank of a fake cluster held and took part in."""
    yield ""
    yield f"dry run of one of {counted.num_devices:,} ranks, {counted.shards} to a copy of the model: counted"
    for part in ("weights", "gradients", "optimizer"):
        yield f"  {part:<15}{format_bytes(getattr(counted, part)):>12}"
    for one in counted.traffic:
        yield f"  {one.kind:<15}{format_bytes(one.num_bytes):>12}  {one.count:>6,} times a step"


def format_seconds(seconds: float) -> str:
    """`3.2 hours`: the largest unit of which there is one."""
    return next((f"{seconds / size:.1f} {unit}" for unit, size in _UNITS if seconds >= size), f"{seconds:.1f} seconds")
