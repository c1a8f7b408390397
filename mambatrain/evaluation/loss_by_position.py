"""What a model makes of its context: the mean loss at each position of the row."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mambatrain.data.batches import IGNORED_TARGET, MicroBatch
from mambatrain.evaluation.held_out import HeldOutLoss, evaluating
from mambatrain.models.language_model import LanguageModel
from mambatrain.ops.reference import computing_dtype

CHUNK_TOKENS = 1024  # logits of at most so many tokens are held at once


class LossByPosition(NamedTuple):
    """Sums at each position of the row, over all rows."""

    nats: Tensor
    """(L,) fp64, summed -log p(target)."""
    num_targets: Tensor
    """(L,) int64, targets that counted."""

    def held_out(self, num_bytes: int | None) -> HeldOutLoss:
        """The same measurement without the positions."""
        return HeldOutLoss(float(self.nats.sum()), int(self.num_targets.sum()), num_bytes)


class Bin(NamedTuple):
    """Neighbouring positions taken together."""

    first: int
    """First position, counted from 1: the number of tokens the model has seen."""
    last: int
    """Last position."""
    num_targets: int
    """Targets that counted."""
    nats_per_token: float
    """Their mean loss."""


def measure_loss_by_position(model: LanguageModel, micro_batches: Iterable[MicroBatch]) -> LossByPosition:
    """Like `measure_held_out`, apart by position; the model is left as it was.

    Rows are windows cut anywhere in the text, so every position shows the same mixture of text and a difference
    between two positions is the context's doing. A document that starts within a row starts from nothing there.
    """
    nats, num_targets = None, None
    with evaluating(model):
        for batch in micro_batches:
            losses = _token_losses(model, batch.to(model.head_weight.device)).cpu().double().sum(0)  # (L,)
            counted = (batch.targets != IGNORED_TARGET).sum(0).cpu()
            nats = losses if nats is None else nats + losses
            num_targets = counted if num_targets is None else num_targets + counted
    if nats is None or num_targets is None:
        return LossByPosition(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    return LossByPosition(nats, num_targets)


def _token_losses(model: LanguageModel, batch: MicroBatch) -> Tensor:
    """(B, L) -log p(target) in nats, 0 where a target does not count."""
    hidden, _ = model.hidden_states(batch.tokens, batch.boundaries)
    weight, parts = model.head_weight, []
    chunks = (torch.split(tensor, CHUNK_TOKENS) for tensor in (hidden.flatten(0, 1), batch.targets.flatten()))
    for part, expected in zip(*chunks, strict=True):
        logits = F.linear(part.to(weight.dtype), weight)
        logits = logits.to(computing_dtype(logits))
        parts.append(F.cross_entropy(logits, expected, ignore_index=IGNORED_TARGET, reduction="none"))
    return torch.cat(parts).view(batch.targets.shape)


def log_spaced_bins(losses: LossByPosition, bins_per_octave: int = 4) -> list[Bin]:
    """Positions 1, 2, 3, ... in bins whose width grows with the position; bins without a target are left out."""
    length = len(losses.nats)
    edges = [1]  # first position of each bin
    while edges[-1] <= length:
        edges.append(max(edges[-1] + 1, round(edges[-1] * 2 ** (1 / bins_per_octave))))
    bins = []
    for first, following in pairwise(edges):
        last = min(following - 1, length)
        count = int(losses.num_targets[first - 1 : last].sum())
        if count:
            bins.append(Bin(first, last, count, float(losses.nats[first - 1 : last].sum()) / count))
    return bins


def draw_loss_by_position(bins: list[Bin], title: str, picture: Path) -> None:
    """A PNG: position on a logarithmic axis, mean loss above it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    centres = [(one.first * one.last) ** 0.5 for one in bins]
    axes.plot(centres, [one.nats_per_token for one in bins], marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of the row seen", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
