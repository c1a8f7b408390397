"""A row for each preference pair: the chosen conversation, and behind it the rejected one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.batches import MicroBatch, Span, read_rows
from mambatrain.data.packing import count_targets
from mambatrain.data.token_shards import TokenShard


class PairRows:
    """The pairs of a shard, one a row, each answer with a boundary at its first token; the same face as `Windows`.

    Args:
        shard: documents 2 n and 2 n + 1 are the chosen and the rejected conversation of pair n; both fit a row.
        row_tokens: L.
        num_documents: its first ones; None: all.
    """

    def __init__(self, shard: TokenShard, row_tokens: int, num_documents: int | None = None) -> None:
        self.shard = shard
        self.row_tokens = row_tokens
        self.num_windows = (shard.num_documents if num_documents is None else num_documents) // 2
        shown = slice(2 * self.num_windows)
        starts, lengths = shard.document_starts[shown], shard.document_lengths[shown]
        self.num_targets = count_targets(shard, np.stack([np.zeros_like(starts), starts, lengths - 1], axis=1))

    def spans(self, window: int) -> list[Span]:
        """The two answers, each with its prompt; the rest of the row is padding."""
        both = (2 * window, 2 * window + 1)
        starts, lengths = self.shard.document_starts, self.shard.document_lengths
        return [Span(int(starts[number]), int(lengths[number]) - 1) for number in both]

    def rows(self, windows: NDArray[np.int64]) -> MicroBatch:
        """The rows of some windows, in that order."""
        return read_rows([(self.shard, self.spans(int(window))) for window in windows], self.row_tokens)
