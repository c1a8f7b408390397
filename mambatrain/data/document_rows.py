"""A row for each document: what begins with a trained state must begin with a document, and hold no other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.batches import MicroBatch, Span, read_rows
from mambatrain.data.packing import count_targets, spans_of_documents
from mambatrain.data.token_shards import TokenShard


class DocumentRows:
    """The documents of a shard, one a row, cut to the row's length or padded; the same face as `Windows`.

    What is cut off a document is not shown: a row that began in its middle would begin with the wrong state.

    Args:
        shard: the documents; those without a target have no row.
        row_tokens: L.
        num_tokens: only documents that end within the first so many tokens of the shard; None: all.
    """

    def __init__(self, shard: TokenShard, row_tokens: int, num_tokens: int | None = None) -> None:
        self.shard = shard
        self.row_tokens = row_tokens
        firsts, lengths = spans_of_documents(shard)
        if num_tokens is not None:
            within = firsts + lengths < num_tokens  # the last target lies behind the last input
            firsts, lengths = firsts[within], lengths[within]
        self.num_windows = len(firsts)
        self.num_cut = int((lengths > row_tokens).sum())
        """Documents that are longer than a row."""
        self._firsts, self._lengths = firsts, np.minimum(lengths, row_tokens)
        self.num_targets = count_targets(shard, np.stack([np.zeros_like(firsts), firsts, self._lengths], axis=1))

    def spans(self, window: int) -> list[Span]:
        """The one span of a row; the rest of it is padding."""
        return [Span(int(self._firsts[window]), int(self._lengths[window]))]

    def rows(self, windows: NDArray[np.int64]) -> MicroBatch:
        """The rows of some windows, in that order."""
        return read_rows([(self.shard, self.spans(int(window))) for window in windows], self.row_tokens)
