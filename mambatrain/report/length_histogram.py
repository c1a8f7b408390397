"""How long documents are: a picture, and the same in characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def histogram_lines(edges: Sequence[int], counts: Sequence[int]) -> list[str]:
    """One line a bin: `  1,024 ..   2,047  ████▌  1,234`; edges (K + 1,), counts (K,)."""
    ranges = [(f"{first:,}", f"{below - 1:,}") for first, below in pairwise(edges)]
    width = max((len(last) for _, last in ranges), default=1)
    largest = max(counts, default=0) or 1
    return [
        f"{first if first != last else '':>{width}} {'..' if first != last else '  '} {last:>{width}}  "
        f"{_bar(count / largest)}  {count:,}"
        for (first, last), count in zip(ranges, counts, strict=True)
    ]


def draw_lengths(lengths: Mapping[str, NDArray[np.int64]], picture: Path, title: str) -> None:
    """A PNG: documents, and the share of all tokens in them, over their length.

    Args:
        lengths: name of a shard -> (num_documents,) text tokens of each of its documents; one at least is not empty.
        picture: the file to write.
        title: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    longest = max(int(values.max()) for values in lengths.values() if len(values))
    edges = np.unique(np.round(np.geomspace(1, longest + 1, 61)).astype(np.int64))
    for (name, values), color in zip(lengths.items(), ("#1f4e9c", "#c4501b"), strict=False):
        label = f"{name}: {len(values):,} documents, {int(values.sum()):,} tokens"
        above.hist(values, bins=edges, histtype="step", color=color, linewidth=1.4, label=label)
        if values.sum():
            ordered = np.sort(values)
            below.plot(ordered, np.cumsum(ordered) / ordered.sum(), color=color, linewidth=1.4)
    above.set(xscale="log", yscale="log", ylabel="documents", title=title)
    above.legend(frameon=False)
    below.set(ylabel="share of tokens in\ndocuments up to here", xlabel="tokens in a document", ylim=(0, 1))
    below.xaxis.set_major_formatter(EngFormatter(sep=" "))
    for axes in (above, below):
        axes.grid(alpha=0.25)
    figure.savefig(picture, dpi=130)


def _bar(fraction: float) -> str:
    """BAR_WIDTH characters wide, to an eighth of one; what is not nothing is seen."""
    eighths = max(round(fraction * BAR_WIDTH * 8), 1) if fraction else 0
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(BAR_WIDTH)
