"""RUN/loss.png of a run that learned from preferences: its loss, the reward margin, and how often it is above 0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambatrain.report.loss_picture import smooth

_ROWS = (
    ("loss", "held_out_loss", "loss (nats per pair)"),
    ("reward_margin", "held_out_reward_margin", "reward margin"),
    ("reward_accuracy", "held_out_reward_accuracy", "margin above 0"),
)


def draw_preferences(lines: Sequence[dict[str, Any]], picture: Path, title: str) -> bool:
    """Draws loss, reward margin and accuracy of training and held-out pairs over steps.

    Args:
        lines: of log.jsonl.
        picture: the PNG to write.
        title: of the picture.

    Returns:
        False where the log holds no step, and nothing was drawn.
    """
    steps = [line for line in lines if line.get("event") == "step"]
    held_out = [line for line in lines if line.get("event") == "held_out"]
    if not steps:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    places = np.array([line["step"] for line in steps])
    axes = figure.subplots(len(_ROWS), 1, sharex=True)
    for axis, (name, held_out_name, label) in zip(axes, _ROWS, strict=True):
        values = np.array([line[name] for line in steps], dtype=np.float64)
        axis.plot(places, values, color="#b8c4d6", linewidth=0.8, label="training, each step")
        axis.plot(places, smooth(values), color="#1f4e9c", linewidth=1.8, label="training, smoothed")
        measured = [line for line in held_out if line[held_out_name] is not None]
        if measured:
            axis.plot(
                [line["step"] for line in measured],
                [line[held_out_name] for line in measured],
                "o-",
                color="#c4501b",
                markersize=4,
                label=f"held out; last {measured[-1][held_out_name]:.3f}",
            )
        axis.set_ylabel(label)
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
    axes[0].set_title(title)
    axes[-1].set_xlabel("step")
    axes[-1].set_ylim(-0.03, 1.03)
    figure.savefig(picture, dpi=130)
    return True
