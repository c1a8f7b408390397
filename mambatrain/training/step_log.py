"""The JSON line of each draw."""

from __future__ import annotations

import math
from typing import Any

from mambatrain.devices import peak_memory_bytes
from mambatrain.training.guards import name_documents
from mambatrain.training.training_run import Draw, TrainingRun


def write_draw(
    run: TrainingRun, draw: Draw, fault: str | None, blamed: list[str], learning_rate: float, seconds: float
) -> None:
    """The draw's JSON line. Skipped draws have no loss in it: NaN is not JSON."""
    progress = run.progress
    tokens_per_second = draw.num_targets / seconds
    line: dict[str, Any] = {
        "event": "step" if fault is None else "skipped",
        "step": progress.step,
        "draw": progress.draw - 1,
        "tokens_seen": progress.tokens_seen,
        "loss": draw.loss if fault is None else None,
        "gradient_norm": draw.gradient_norm if fault is None else None,
        "learning_rate": learning_rate,
        "num_targets": draw.num_targets,
        "tokens_per_second": tokens_per_second,
        "model_flops_utilisation": tokens_per_second
        * run.flops_per_token
        / (run.peak_flops * run.accelerator.num_processes),
        "seconds": seconds,
        "data_seconds": draw.data_seconds,
        "memory_bytes": peak_memory_bytes(run.accelerator.device),
    }
    if fault is None:
        line |= draw.curves
    if len(run.order.names) > 1:
        line["source_epochs"] = run.order.drawn_until(progress.draw)
        line["source_rows"] = run.order.rows_by_source(progress.draw - 1)
    if fault is not None:
        line["reason"], line["gradients"] = fault, blamed
        line["documents"] = name_documents(run.order, [progress.draw - 1])
        run.reporter.say(f"draw {progress.draw - 1} was skipped: {fault}")
    progress.log_lines += 1
    run.reporter.write_step(line, run.recipe.training.log_every_steps)


def finite_or_none(value: float) -> float | None:
    """NaN and infinity are not JSON."""
    return value if math.isfinite(value) else None
