"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from mambatrain.recipe import Recipe


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """The rate of update `step` (the first is 0), so that the first update already moves and the last is at the floor.

    Warm-up: (step + 1) / warmup_steps of the peak. cosine: half a cosine from the peak to final_fraction of it.
    wsd (warm-up, stable, decay; arXiv 2404.06395): the peak, then linear to final_fraction in the last
    decay_fraction of the steps.
    """
    peak, schedule, total = recipe.optimizer.learning_rate, recipe.schedule, recipe.total_steps
    warmup = recipe.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = schedule.final_fraction
    if schedule.kind == "cosine":
        progress = (step - warmup) / max(1, total - 1 - warmup)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    if schedule.kind == "wsd":
        decay_steps = max(1, round(schedule.decay_fraction * total))
        remaining = min(1.0, (total - 1 - step) / decay_steps)
        return peak * (floor + (1 - floor) * remaining)
    return peak
