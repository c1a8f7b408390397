"""The loss of a run in characters, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def sketch_loss(losses: Sequence[float], width: int = 64, height: int = 6) -> list[str]:
    """Lines of a chart: means of `width` stretches of the run as columns, the largest and smallest of them named.

    Args:
        losses: of the applied steps, nats per token, oldest first.
        width: columns at most.
        height: lines; each shows eight levels.

    Returns:
        `height` lines, or none where nothing finite was given.
    """
    losses = [loss for loss in losses if math.isfinite(loss)]
    if not losses:
        return []
    columns = min(width, len(losses))
    edges = [round(index * len(losses) / columns) for index in range(columns + 1)]
    means = [sum(losses[low:high]) / (high - low) for low, high in pairwise(edges)]
    lowest, highest = min(means), max(means)
    steps = height * 8 - 1  # the lowest column is an eighth of a line: seen, and above nothing
    span = (highest - lowest) or 1.0
    levels = [1 + round((mean - lowest) / span * steps) for mean in means]
    labels = {0: f"{highest:.3f}", height - 1: f"{lowest:.3f}"}
    margin = max(map(len, labels.values()))
    return [
        f"{labels.get(row, ''):>{margin}} "
        + "".join(_EIGHTHS[min(8, max(0, level - 8 * (height - 1 - row)))] for level in levels)
        for row in range(height)
    ]
