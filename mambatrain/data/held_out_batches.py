"""What the held-out loss is measured on: the same rows every time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.batches import MicroBatch, Windows, uncounted
from mambatrain.data.document_rows import DocumentRows
from mambatrain.data.packing import PackedWindows, pack_shard
from mambatrain.data.pair_rows import PairRows
from mambatrain.data.token_shards import TokenShard


class HeldOutBatches:
    """Whole held-out documents up to a number of tokens, read in order; conversations are packed into rows."""

    def __init__(
        self,
        shard: TokenShard,
        document_bytes: NDArray[np.int64] | None,
        row_tokens: int,
        max_tokens: int,
        document_rows: bool = False,
        pairs: bool = False,
    ) -> None:
        """
        Args:
            shard: the held-out pair.
            document_bytes: (num_documents,) UTF-8 bytes of each document's text; None: not known.
            row_tokens: L.
            max_tokens: documents are taken while they fit; the first real one always is.
            document_rows: each document has a row of its own, and what is longer is cut (bytes are not known then).
            pairs: the documents are preference pairs, which are taken whole; bits per byte say nothing of them.
        """
        ends = shard.document_starts + shard.document_lengths  # in tokens
        opening = shard.num_opening
        fitting = int(np.searchsorted(ends, max_tokens, side="right"))
        num_documents = max(fitting, min(opening + 1, shard.num_documents))
        if pairs:
            num_documents = max(num_documents // 2 * 2, min(2, shard.num_documents))
        num_tokens = int(ends[num_documents - 1]) if num_documents else 0
        self.windows: Windows | DocumentRows | PackedWindows | PairRows
        if pairs:
            self.windows = PairRows(shard, row_tokens, num_documents)
        elif document_rows:
            self.windows = DocumentRows(shard, row_tokens, num_tokens)
        elif shard.counted is not None:
            self.windows = PackedWindows(shard, row_tokens, pack_shard(shard, row_tokens, num_documents))
        else:
            self.windows = Windows(shard, row_tokens, num_tokens)
        cut = isinstance(self.windows, DocumentRows) and self.windows.num_cut > 0
        self.num_bytes = None if document_bytes is None or cut or pairs else int(document_bytes[:num_documents].sum())
        self.num_documents = max(num_documents - opening, 0)
        self.num_targets = self.windows.num_targets

    def micro_batches(self, rows: int, rank: int = 0, num_ranks: int = 1) -> Iterator[MicroBatch]:
        """One rank's share (every num_ranks-th window), `rows` windows at a time.

        Every rank gives equally many micro-batches, since ranks that share a model go through it together: one that has
        no window left gives a row that does not count.
        """
        mine = np.arange(rank, self.windows.num_windows, num_ranks, dtype=np.int64)
        for first in range(0, -(-self.windows.num_windows // num_ranks), rows):
            some = mine[first : first + rows]
            yield self.windows.rows(some) if len(some) else uncounted(self.windows.rows(np.zeros(1, dtype=np.int64)))
