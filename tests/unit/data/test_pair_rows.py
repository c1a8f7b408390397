"""A row for each preference pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mambatrain.data.batches import IGNORED_TARGET
from mambatrain.data.held_out_batches import HeldOutBatches
from mambatrain.data.pair_rows import PairRows
from mambatrain.data.token_shards import TokenShard, TokenShardWriter
from mambatrain.data.training_order import OrderStage, Source, TrainingOrder

DOCUMENTS = [[1, 2, 3, 4], [1, 2, 5], [6, 7], [6, 8, 9], [1, 5, 5, 5], [1, 6]]
COUNTED = [[0, 0, 1, 1], [0, 0, 1], [0, 1], [0, 1, 1], [0, 1, 1, 1], [0, 1]]


@pytest.fixture
def shard(tmp_path: Path) -> TokenShard:
    with TokenShardWriter(tmp_path / "train", np.dtype(np.uint16)) as writer:
        for document in DOCUMENTS:
            writer.append(np.array(document))
    opened = TokenShard(tmp_path / "train")
    opened.ends_marked = False
    opened.counted = np.array([mark for marks in COUNTED for mark in marks], dtype=bool)
    return opened


def test_each_row_holds_both_answers_each_behind_a_boundary(shard: TokenShard) -> None:
    rows = PairRows(shard, 6)
    assert (rows.num_windows, rows.num_targets) == (3, 3 + 3 + 4)
    batch, pad = rows.rows(np.arange(3)), IGNORED_TARGET
    assert batch.tokens.tolist() == [[1, 2, 3, 1, 2, 0], [6, 6, 8, 0, 0, 0], [1, 5, 5, 1, 0, 0]]
    assert batch.targets.tolist() == [[pad, 3, 4, pad, 5, pad], [7, 8, 9, pad, pad, pad], [5, 5, 5, 6, pad, pad]]
    assert [row.nonzero().flatten().tolist() for row in batch.boundaries] == [[0, 3], [0, 1], [0, 3]]
    assert batch.references is None and len(batch.inputs) == 3


def test_the_references_of_a_row_are_those_of_its_answers(shard: TokenShard) -> None:
    shard.references = np.arange(6, dtype=np.float64) / 7
    order = TrainingOrder([OrderStage(0, 2, [Source("pairs", PairRows(shard, 6))])], seed=1)
    seen = []
    for draw in range(3):
        (batch,) = order.micro_batches(draw, 2)
        assert batch.references is not None and batch.references.dtype.itemsize == 8
        rows = zip(order.rows_of(draw), batch.references.tolist(), strict=True)
        seen += [(row.window, tuple(both)) for row, both in rows]
        assert len(batch.inputs) == 4
    assert set(seen) == {(window, (2 * window / 7, (2 * window + 1) / 7)) for window in range(3)}


def test_held_out_pairs_are_taken_whole(shard: TokenShard) -> None:
    for max_tokens, num_pairs in ((1, 1), (10, 1), (12, 2), (99, 3)):
        batches = HeldOutBatches(shard, np.ones(6, dtype=np.int64), 6, max_tokens, pairs=True)
        assert (batches.windows.num_windows, batches.num_bytes) == (num_pairs, None)
    share = list(batches.micro_batches(1, rank=1, num_ranks=2))
    assert len(share) == 2 and not (share[1].targets != IGNORED_TARGET).any()
