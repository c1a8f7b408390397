"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from mambatrain.recipe import Recipe


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """The rate of update `step` (the first is 0), so that the first update already moves and the last is at the floor.

    Warm-up: (step + 1) / warmup_steps of the peak. cosine: half a cosine from the peak to final_fraction of it.
    linear: a straight line between the same. wsd (warm-up, stable, decay; arXiv 2404.06395): the peak, then linear to
    final_fraction in the last decay_steps.
    """
    peak, schedule, total = recipe.optimizer.learning_rate, recipe.schedule, recipe.total_steps
    warmup = recipe.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = schedule.final_fraction
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    if schedule.kind == "cosine":
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule.kind == "linear":
        return peak * (floor + (1 - floor) * (1 - progress))
    if schedule.kind == "wsd":
        remaining = min(1.0, (total - 1 - step) / recipe.decay_steps)
        return peak * (floor + (1 - floor) * remaining)
    return peak
