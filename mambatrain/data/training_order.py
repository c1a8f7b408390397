"""Which rows a draw shows: a pure function of (seed, data section, draw), so there is nothing to save or to replay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.batches import MicroBatch, Windows, read_rows
from mambatrain.data.document_rows import DocumentRows
from mambatrain.data.document_streams import DocumentStreams
from mambatrain.data.interleaving import Interleaving
from mambatrain.data.packing import PackedWindows
from mambatrain.data.pair_rows import PairRows
from mambatrain.data.permutation import permute

AnyWindows = Windows | PackedWindows | DocumentRows | DocumentStreams | PairRows


@dataclass(frozen=True)
class Source:
    """Windows that rows are drawn from.

    Attributes:
        name: what it is called in the log; sources of one name (in different stages) are one source.
        windows: all of one stage have the same row_tokens.
        weight: rows drawn from it, in proportion to the other weights of its stage.
    """

    name: str
    windows: AnyWindows
    weight: float = 1.0


@dataclass(frozen=True)
class OrderStage:
    """A stretch of draws: from `first_draw` to the next stage's, or without end."""

    first_draw: int
    rows_per_step: int
    sources: Sequence[Source]

    @property
    def row_tokens(self) -> int:
        return self.sources[0].windows.row_tokens


@dataclass(frozen=True)
class DrawnRow:
    """One row of a draw."""

    source: Source
    window: int
    epoch: int


class TrainingOrder:
    """Draw -> rows.

    The rows of a stage take turns by `Interleaving`. Each source has an order of its own windows, keyed by
    (seed, epoch, source), in which an epoch shows every window once; it goes on from stage to stage. (With another
    row length windows are others, and their order begins anew.)
    """

    def __init__(self, stages: Sequence[OrderStage], seed: int) -> None:
        self.stages = list(stages)
        self.seed = seed
        self.names = list(dict.fromkeys(source.name for stage in stages for source in stage.sources))
        self._interleavings = [Interleaving([source.weight for source in stage.sources]) for stage in stages]
        # Rows that each (name, row length) gave before each stage.
        self._before: list[dict[tuple[str, int], int]] = [defaultdict(int)]
        for number, stage in enumerate(self.stages[1:]):
            self._before.append(self._rows_until(number, stage.first_draw))

    def stage_of(self, draw: int) -> int:
        """Index of the stage that a draw belongs to."""
        return int(np.searchsorted([stage.first_draw for stage in self.stages], draw, side="right")) - 1

    def rows_of(self, draw: int) -> list[DrawnRow]:
        """The rows of a draw, in the order of their slots."""
        number = self.stage_of(draw)
        stage, before = self.stages[number], self._before[number]
        first = (draw - stage.first_draw) * stage.rows_per_step
        places = np.arange(first, first + stage.rows_per_step, dtype=np.int64)
        chosen, turns = self._interleavings[number].at(places)
        epochs, windows = np.empty_like(places), np.empty_like(places)
        for index in np.unique(chosen):
            source, mine = stage.sources[index], chosen == index
            nth = turns[mine] + before[source.name, stage.row_tokens]
            epochs[mine], windows[mine] = self._nth_windows(source, nth)
        return [
            DrawnRow(stage.sources[index], int(window), int(epoch))
            for index, window, epoch in zip(chosen, windows, epochs, strict=True)
        ]

    def micro_batches(self, draw: int, micro_batch_rows: int, rank: int = 0, num_ranks: int = 1) -> list[MicroBatch]:
        """One rank's share of a draw: a contiguous block of its slots, cut into micro-batches.

        Args:
            draw: index of the draw.
            micro_batch_rows: rows of the first stage's length; a stage of other rows has as many tokens in one.
            rank: whose share.
            num_ranks: of how many.

        Raises:
            ValueError: the rows of a step do not divide into ranks.
        """
        stage = self.stages[self.stage_of(draw)]
        if stage.rows_per_step % num_ranks:
            raise ValueError(f"{stage.rows_per_step} rows do not divide into {num_ranks} ranks")
        share = stage.rows_per_step // num_ranks
        mine = self.rows_of(draw)[rank * share : (rank + 1) * share]
        contents = [(row.source.windows.shard, row.source.windows.spans(row.window)) for row in mine]
        at_once = max(micro_batch_rows * self.stages[0].row_tokens // stage.row_tokens, 1)
        return [read_rows(contents[i : i + at_once], stage.row_tokens) for i in range(0, share, at_once)]

    def shares_of(self, draw: int) -> dict[str, float]:
        """Name of a source -> its share of the rows, in the stage of a draw."""
        number = self.stage_of(draw)
        shares = self._interleavings[number].shares
        return {source.name: float(share) for source, share in zip(self.stages[number].sources, shares, strict=True)}

    def rows_by_source(self, draw: int) -> dict[str, int]:
        """Name of a source -> rows of it in one draw."""
        counts = dict.fromkeys(self.names, 0)
        for row in self.rows_of(draw):
            counts[row.source.name] += 1
        return counts

    def drawn_until(self, draw: int) -> dict[str, float]:
        """Name of a source -> epochs of it that draws 0 .. draw - 1 showed."""
        epochs = dict.fromkeys(self.names, 0.0)
        counts = self._rows_until(self.stage_of(max(draw - 1, 0)), draw)
        for name, row_tokens in counts:
            epochs[name] += counts[name, row_tokens] / self.windows_of(name, row_tokens).num_windows
        return epochs

    def rows_until(self, draw: int) -> dict[tuple[str, int], int]:
        """(name of a source, row length) -> rows of it in draws 0 .. draw - 1."""
        return dict(self._rows_until(self.stage_of(max(draw - 1, 0)), draw))

    def _rows_until(self, number: int, draw: int) -> dict[tuple[str, int], int]:
        """`rows_until` of a draw that lies in a stage, or just behind it."""
        stage = self.stages[number]
        counts = defaultdict(int, self._before[number])
        turns = self._interleavings[number].turns_before((draw - stage.first_draw) * stage.rows_per_step)
        for source, count in zip(stage.sources, turns.tolist(), strict=True):
            counts[source.name, stage.row_tokens] += count
        return counts

    def windows_of(self, name: str, row_tokens: int) -> AnyWindows:
        """The windows of a source in the stages of one row length."""
        of_name = (source for stage in self.stages for source in stage.sources if source.name == name)
        return next(source.windows for source in of_name if source.windows.row_tokens == row_tokens)

    def _nth_windows(self, source: Source, nth: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epoch and window of some of a source's rows, counted from the first it ever gives."""
        if isinstance(source.windows, DocumentStreams):  # the only source: its n-th row is a draw's slot
            return np.array([source.windows.epoch_of(int(window)) for window in nth]), nth
        size = source.windows.num_windows
        epochs, within = np.divmod(nth, size)
        number = self.names.index(source.name)
        windows = np.empty_like(nth)
        for epoch in np.unique(epochs):
            # Sources behind the first have a key of one part more, so that two of one size differ.
            key = (self.seed, int(epoch)) if number == 0 else (self.seed, int(epoch), number)
            windows[epochs == epoch] = permute(within[epochs == epoch], size, *key)
        return epochs, windows
