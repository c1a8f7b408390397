from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambatrain.data.batches import IGNORED_TARGET, HeldOutBatches, MicroBatch, TrainingOrder, Windows
from mambatrain.data.token_shards import TokenShard, TokenShardWriter

END = 0


def write_shard(folder: Path, lengths: list[int]) -> TokenShard:
    """Documents of distinct ids (1, 2, 3, ...), each followed by END, behind an opening END."""
    with TokenShardWriter(folder / "s", np.dtype("<i4")) as writer:
        writer.append(np.array([END]))
        next_id = 1
        for length in lengths:
            writer.append(np.append(np.arange(next_id, next_id + length), END))
            next_id += length
    return TokenShard(folder / "s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), row_tokens=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_every_token_but_the_opening_one_is_a_target_exactly_once(
    folder: Path, lengths: list[int], row_tokens: int
) -> None:
    windows = Windows(write_shard(folder, lengths), row_tokens)
    batch = windows.rows(np.arange(windows.num_windows))
    targets = batch.targets[batch.targets != IGNORED_TARGET]
    assert targets.tolist() == windows.shard.tokens(1, windows.shard.num_tokens).tolist()


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), row_tokens=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_boundaries_lie_at_the_end_tokens_and_nowhere_else(folder: Path, lengths: list[int], row_tokens: int) -> None:
    windows = Windows(write_shard(folder, lengths), row_tokens)
    batch = windows.rows(np.arange(windows.num_windows))
    counted = batch.targets != IGNORED_TARGET
    assert torch.equal(batch.boundaries[counted], (batch.tokens == END)[counted])


def test_an_end_token_inside_a_document_is_no_boundary(tmp_path: Path) -> None:
    with TokenShardWriter(tmp_path / "s", np.dtype("<i4")) as writer:
        writer.append(np.array([END]))
        writer.append(np.array([5, END, 6, END]))
    batch = Windows(TokenShard(tmp_path / "s"), 4).rows(np.array([0]))
    assert batch.tokens.tolist() == [[END, 5, END, 6]]
    assert batch.boundaries.tolist() == [[True, False, False, False]]


def test_every_epoch_shows_every_window_once_in_its_own_order(tmp_path: Path) -> None:
    order = TrainingOrder(Windows(write_shard(tmp_path, [7] * 30), 8), rows_per_step=3, seed=1)
    size = order.windows.num_windows
    drawn = np.concatenate([order.windows_of(draw) for draw in range(size)])  # three epochs
    epochs = drawn.reshape(3, size)
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4])
def test_ranks_and_micro_batches_split_a_draw_without_changing_it(
    tmp_path: Path, num_ranks: int, micro_batch_rows: int
) -> None:
    order = TrainingOrder(Windows(write_shard(tmp_path, [5, 9, 2, 11, 30, 8]), 6), rows_per_step=6, seed=3)
    whole = order.windows.rows(order.windows_of(4))
    parts = [part for rank in range(num_ranks) for part in order.micro_batches(4, micro_batch_rows, rank, num_ranks)]
    for field in MicroBatch._fields:
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))


def test_rows_that_do_not_divide_into_ranks_are_refused(tmp_path: Path) -> None:
    order = TrainingOrder(Windows(write_shard(tmp_path, [50]), 4), rows_per_step=4, seed=0)
    with pytest.raises(ValueError, match="4 rows do not divide into 3 ranks"):
        order.micro_batches(0, 1, 0, 3)


def test_held_out_takes_whole_documents_and_their_bytes(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, [4, 6, 9])  # ends at tokens 1, 6, 13, 23
    sizes = np.array([0, 40, 60, 90])
    held_out = HeldOutBatches(shard, sizes, row_tokens=5, max_tokens=15)
    assert (held_out.num_documents, held_out.num_bytes, held_out.num_targets) == (2, 100, 12)
    batches = list(held_out.micro_batches(rows=2))
    assert sum(int((batch.targets != IGNORED_TARGET).sum()) for batch in batches) == 12


def test_held_out_takes_one_document_however_long(tmp_path: Path) -> None:
    held_out = HeldOutBatches(write_shard(tmp_path, [40, 6]), np.array([0, 41, 7]), row_tokens=5, max_tokens=10)
    assert (held_out.num_documents, held_out.num_bytes) == (1, 41)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_the_held_out_windows(tmp_path: Path, num_ranks: int) -> None:
    shard = write_shard(tmp_path, [7, 8, 9, 10])
    held_out = HeldOutBatches(shard, np.array([0, 7, 8, 9, 10]), row_tokens=4, max_tokens=1000)
    seen = [
        row.tolist()
        for rank in range(num_ranks)
        for batch in held_out.micro_batches(2, rank, num_ranks)
        for row in batch.targets
    ]
    assert sorted(token for row in seen for token in row if token != IGNORED_TARGET) == sorted(
        shard.tokens(1, shard.num_tokens).tolist()
    )
