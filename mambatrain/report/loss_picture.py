"""loss.png: what a run's log looks like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def draw_loss(lines: Sequence[dict[str, Any]], picture: Path, title: str) -> bool:
    """Draws training and held-out loss over tokens, and gradient norm and learning rate below.

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
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    tokens = np.array([line["tokens_seen"] for line in steps])
    loss = np.array([line["loss"] for line in steps], dtype=np.float64)
    above.plot(tokens, loss, color="#b8c4d6", linewidth=0.8, label="training, each step")
    above.plot(tokens, smooth(loss), color="#1f4e9c", linewidth=1.8, label="training, smoothed")
    if held_out:
        above.plot(
            [line["tokens_seen"] for line in held_out],
            [line["held_out_loss"] for line in held_out],
            "o-",
            color="#c4501b",
            markersize=4,
            label=f"held out; last {_last_held_out(held_out[-1])}",
        )
    above.set_ylabel("loss (nats per token)")
    above.set_title(title)
    above.legend(frameon=False)
    above.grid(alpha=0.25)
    norms = np.array([line["gradient_norm"] for line in steps], dtype=np.float64)
    below.plot(tokens, norms, color="#6b7280", linewidth=0.8)
    below.set_yscale("log")
    below.set_ylabel("gradient norm")
    below.set_xlabel("tokens seen")
    below.xaxis.set_major_formatter(EngFormatter(sep=" "))
    below.grid(alpha=0.25)
    rate = below.twinx()
    rate.plot(tokens, [line["learning_rate"] for line in steps], color="#2f855a", linewidth=1.4)
    rate.set_ylabel("learning rate", color="#2f855a")
    figure.savefig(picture, dpi=130)
    return True


def _last_held_out(line: dict[str, Any]) -> str:
    """Bits per byte where the text's bytes are known; a loss that is not finite is no number in the log."""
    for name, unit in (("held_out_bits_per_byte", "bits per byte"), ("held_out_loss", "nats per token")):
        if line[name] is not None:
            return f"{line[name]:.3f} {unit}"
    return "not finite"


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred running mean over about 2% of the run, shortened at its ends."""
    half = max(1, len(values) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return np.asarray((sums[last] - sums[first]) / (last - first))
