"""Which tokens a draw shows: a pure function of (seed, corpus, draw), so that there is nothing to save or to replay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambatrain.data.permutation import permute
from mambatrain.data.token_shards import TokenShard

IGNORED_TARGET = -100  # torch's convention for a target that does not count


class MicroBatch(NamedTuple):
    """Rows that go through the model together."""

    tokens: Tensor
    """(B, L) int64."""
    boundaries: Tensor
    """(B, L) bool, True where a document starts: at the end token of the one before."""
    targets: Tensor
    """(B, L) int64, the next token; IGNORED_TARGET where a position does not count."""

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Windows:
    """The contiguous windows of a shard's first `num_tokens` tokens: window w is read from token w * row_tokens on.

    A window reads row_tokens + 1 tokens, so neighbours share one: the last target of the first is the first input of
    the second, and every token but the shard's opening one is a target exactly once. The last window is padded
    with positions that do not count.
    """

    def __init__(self, shard: TokenShard, row_tokens: int, num_tokens: int | None = None) -> None:
        self.shard = shard
        self.row_tokens = row_tokens
        self.num_tokens = shard.num_tokens if num_tokens is None else num_tokens
        self.num_targets = max(self.num_tokens - 1, 0)
        self.num_windows = -(-self.num_targets // row_tokens)
        # Where each document's end token lies, which is where the next document's boundary is.
        self.boundary_positions = shard.document_starts + shard.document_lengths - 1

    def rows(self, windows: NDArray[np.int64]) -> MicroBatch:
        """The rows of some windows, in that order."""
        length = self.row_tokens
        tokens = np.zeros((len(windows), length), dtype=np.int64)
        targets = np.full((len(windows), length), IGNORED_TARGET, dtype=np.int64)
        boundaries = np.zeros((len(windows), length), dtype=bool)
        for row, window in enumerate(windows):
            start = int(window) * length
            stop = min(start + length, self.num_tokens - 1)  # of the inputs
            seen = self.shard.tokens(start, stop + 1).astype(np.int64)
            tokens[row, : stop - start] = seen[:-1]
            targets[row, : stop - start] = seen[1:]
            first, last = np.searchsorted(self.boundary_positions, [start, stop])
            boundaries[row, self.boundary_positions[first:last] - start] = True
        return MicroBatch(torch.from_numpy(tokens), torch.from_numpy(boundaries), torch.from_numpy(targets))


class TrainingOrder:
    """Draw -> rows. Each epoch shows every window once, in an order keyed by (seed, epoch)."""

    def __init__(self, windows: Windows, rows_per_step: int, seed: int) -> None:
        self.windows = windows
        self.rows_per_step = rows_per_step
        self.seed = seed

    def windows_of(self, draw: int) -> NDArray[np.int64]:
        """(rows_per_step,) the windows of a draw, in the order of their slots."""
        places = np.arange(draw * self.rows_per_step, (draw + 1) * self.rows_per_step, dtype=np.int64)
        epochs, within = np.divmod(places, self.windows.num_windows)
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            chosen[of_epoch] = permute(within[of_epoch], self.windows.num_windows, self.seed, int(epoch))
        return chosen

    def micro_batches(self, draw: int, micro_batch_rows: int, rank: int = 0, num_ranks: int = 1) -> list[MicroBatch]:
        """One rank's share of a draw: a contiguous block of its slots, cut into micro-batches.

        Raises:
            ValueError: the rows of a step do not divide into ranks.
        """
        if self.rows_per_step % num_ranks:
            raise ValueError(f"{self.rows_per_step} rows do not divide into {num_ranks} ranks")
        share = self.rows_per_step // num_ranks
        chosen = self.windows_of(draw)[rank * share : (rank + 1) * share]
        return [self.windows.rows(chosen[i : i + micro_batch_rows]) for i in range(0, share, micro_batch_rows)]


class HeldOutBatches:
    """Whole held-out documents up to a number of tokens, read in order."""

    def __init__(self, shard: TokenShard, document_bytes: NDArray[np.int64], row_tokens: int, max_tokens: int) -> None:
        """
        Args:
            shard: the held-out pair.
            document_bytes: (num_documents,) UTF-8 bytes of each document's text.
            row_tokens: L.
            max_tokens: documents are taken while they fit; the first real one always is.
        """
        ends = shard.document_starts + shard.document_lengths  # in tokens; document 0 is the opening end token
        num_documents = max(int(np.searchsorted(ends, max_tokens, side="right")), min(2, shard.num_documents))
        num_tokens = int(ends[num_documents - 1]) if num_documents else 0
        self.windows = Windows(shard, row_tokens, num_tokens)
        self.num_bytes = int(document_bytes[:num_documents].sum())
        self.num_documents = max(num_documents - 1, 0)

    @property
    def num_targets(self) -> int:
        return self.windows.num_targets

    def micro_batches(self, rows: int, rank: int = 0, num_ranks: int = 1) -> Iterator[MicroBatch]:
        """One rank's share (every num_ranks-th window), `rows` windows at a time."""
        mine = np.arange(rank, self.windows.num_windows, num_ranks, dtype=np.int64)
        for first in range(0, len(mine), rows):
            yield self.windows.rows(mine[first : first + rows])
