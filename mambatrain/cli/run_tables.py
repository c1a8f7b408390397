"""What `runs` shows, for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mambatrain.runs.folder import RunFolder
    from mambatrain.runs.overview import RunSummary

_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60))


def run_table(summaries: list[RunSummary], below: Path) -> list[str]:
    """One line a run under a line of headings, in columns."""
    rows = [("name", "model", "step", "tokens", "bits/byte", "state", "age", "size")]
    for one in summaries:
        name = str(one.path.relative_to(below)) if one.path != below else one.path.resolve().name
        steps = f"{one.step:,}/{one.total_steps:,}" if one.state != "unreadable" else ""
        quality = "" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}"
        age, size = format_age(one.seconds_since_change), format_bytes(one.num_bytes)
        rows.append((name, one.model, steps, f"{one.tokens_seen:,}", quality, one.state, age, size))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, 1, 5}  # columns of words
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def run_lines(run: RunFolder, summary: RunSummary) -> Iterator[str]:
    """A run in full: where it stands, its parameters, its checkpoints, its loss, its recipe."""
    from mambatrain.models.flops import count_parameters
    from mambatrain.recipe import read_recipe
    from mambatrain.report.loss_sketch import sketch_loss
    from mambatrain.runs.branch import read_branching
    from mambatrain.runs.checkpoint import list_checkpoints, read_progress, step_of
    from mambatrain.runs.folder import read_log
    from mambatrain.runs.overview import folder_bytes, read_run_facts

    recipe, facts = read_recipe(str(run.recipe_file)), read_run_facts(run)
    parts = count_parameters(recipe.model)
    yield f"run          {run.path}"
    yield f"state        {summary.state}, step {summary.step:,} of {summary.total_steps:,}, last written " + (
        f"{format_age(summary.seconds_since_change)} ago, {format_bytes(summary.num_bytes)} on disk"
    )
    if (came_from := read_branching(run)) is not None:
        yield f"branched     at step {came_from.step:,} from {came_from.checkpoint}"
        yield from (f"  {line}" for line in came_from.changed)
    yield f"model        {recipe.model.block}, {parts['total']:,} parameters: " + ", ".join(
        f"{name} {count:,}" for name, count in parts.items() if count and name != "total"
    )
    if facts:
        kernels = facts.get("kernels", {})
        yield f"ran on       {facts.get('device')}, {facts.get('num_processes')} process(es), {facts.get('precision')}"
        yield f"kernels      {kernels.get('backend')}: {kernels.get('reason')}"
    quality = "not measured" if summary.bits_per_byte is None else f"{summary.bits_per_byte:.4f} bits per byte"
    yield f"held out     {quality}"
    yield f"tokens seen  {summary.tokens_seen:,}"
    checkpoints = list_checkpoints(run.path)
    yield "checkpoints  " + ("" if checkpoints else "none yet")
    best = None
    for checkpoint in checkpoints:
        try:
            best = read_progress(checkpoint).best_step
        except (OSError, ValueError, TypeError):  # `runs verify` says what is wrong with it
            continue
    for checkpoint in checkpoints:
        mark = "  lowest held-out loss" if step_of(checkpoint) == best else ""
        yield f"  {checkpoint.name}  {format_bytes(folder_bytes(checkpoint)):>10}{mark}"
    losses = [line["loss"] for line in read_log(run.log_file) if line.get("event") == "step"]
    if sketch := sketch_loss(losses):
        yield f"training loss, nats per {'token' if recipe.preferences is None else 'pair'}, {len(losses):,} steps"
        yield from (f"  {line}" for line in sketch)
    yield f"picture      {run.loss_picture if run.loss_picture.is_file() else 'drawn when the run ends or is stopped'}"
    yield f"recipe       {run.recipe_file}"
    yield from (f"  {line}" for line in run.recipe_file.read_text(encoding="utf-8").splitlines())


def format_bytes(count: float) -> str:
    """`1.4 GiB`: three digits at least, powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def format_age(seconds: float) -> str:
    """`3 h`: the largest unit of which there is one."""
    return next((f"{seconds / size:.0f} {unit}" for unit, size in _UNITS if seconds >= size), f"{seconds:.0f} s")
