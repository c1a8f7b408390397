"""A row for each document."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mambatrain.data.batches import IGNORED_TARGET
from mambatrain.data.document_rows import DocumentRows
from mambatrain.data.held_out_batches import HeldOutBatches
from mambatrain.data.token_shards import TokenShard, TokenShardWriter

END = 9
DOCUMENTS = [[END], [1, 2, END], [3, 4, 5, 6, 7, END], [END], [8, END]]  # the first opens the shard; one is empty


@pytest.fixture
def shard(tmp_path: Path) -> TokenShard:
    with TokenShardWriter(tmp_path / "train", np.dtype(np.uint16)) as writer:
        for document in DOCUMENTS:
            writer.append(np.array(document))
    opened = TokenShard(tmp_path / "train")
    opened.end_id = END
    return opened


def test_each_row_is_one_document_cut_or_padded(shard: TokenShard) -> None:
    rows = DocumentRows(shard, 4)
    assert (rows.num_windows, rows.num_cut, rows.num_targets) == (4, 1, 3 + 4 + 1 + 2)
    batch = rows.rows(np.arange(4))
    pad = IGNORED_TARGET
    assert batch.targets.tolist() == [[1, 2, END, pad], [3, 4, 5, 6], [END, pad, pad, pad], [8, END, pad, pad]]
    assert [tokens[: (row != pad).sum()].tolist() for tokens, row in zip(batch.tokens, batch.targets, strict=True)] == [
        [END, 1, 2],
        [END, 3, 4, 5],
        [END],
        [END, 8],
    ]
    # A row's own first position is its only boundary: behind it a trained state is not dropped.
    assert batch.boundaries.tolist() == [[True, False, False, False]] * 4


def test_held_out_documents_are_those_that_fit_and_lose_their_bytes_when_cut(shard: TokenShard) -> None:
    known = np.array([0, 2, 5, 0, 1])
    whole = HeldOutBatches(shard, known, 8, 11, document_rows=True)
    (batch,) = whole.micro_batches(8)
    assert (whole.num_documents, whole.num_targets, whole.num_bytes) == (3, 3 + 6 + 1, 7)
    assert (batch.targets != IGNORED_TARGET).sum() == whole.num_targets
    assert HeldOutBatches(shard, known, 4, 11, document_rows=True).num_bytes is None
