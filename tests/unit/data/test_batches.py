from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambatrain.data.batches import IGNORED_TARGET, Span, Windows, read_rows
from mambatrain.data.held_out_batches import HeldOutBatches
from mambatrain.data.token_shards import TokenShard, TokenShardWriter
from mambatrain.errors import UserError

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


def write_unmarked(folder: Path, lengths: list[int]) -> TokenShard:
    """Documents of distinct ids (1, 2, 3, ...) one behind the other, without end tokens."""
    with TokenShardWriter(folder / "u", np.dtype("<i4")) as writer:
        next_id = 1
        for length in lengths:
            writer.append(np.arange(next_id, next_id + length))
            next_id += length
    shard = TokenShard(folder / "u")
    shard.ends_marked = False
    return shard


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), row_tokens=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_without_end_tokens_a_document_starts_at_its_first_token_which_is_no_target(
    folder: Path, lengths: list[int], row_tokens: int
) -> None:
    shard = write_unmarked(folder, lengths)
    windows = Windows(shard, row_tokens)
    batch = windows.rows(np.arange(windows.num_windows))
    firsts = {int(shard.document(index)[0]) for index, length in enumerate(lengths) if length}
    targets = batch.targets[batch.targets != IGNORED_TARGET].tolist()
    assert targets == [token for token in range(2, sum(lengths) + 1) if token not in firsts]
    assert windows.num_targets == len(targets)
    real = batch.tokens > 0
    expected = [token in firsts for token in batch.tokens[real].tolist()]
    assert batch.boundaries[real].tolist() == expected
    assert not batch.boundaries[~real].any()


def test_held_out_documents_of_a_pair_have_no_bytes(tmp_path: Path) -> None:
    held_out = HeldOutBatches(write_unmarked(tmp_path, [4, 6, 9]), None, row_tokens=5, max_tokens=12)
    assert (held_out.num_documents, held_out.num_bytes, held_out.num_targets) == (2, None, 8)
    batches = list(held_out.micro_batches(rows=2))
    assert sum(int((batch.targets != IGNORED_TARGET).sum()) for batch in batches) == 8
    one = HeldOutBatches(write_unmarked(tmp_path, [40, 6]), None, row_tokens=5, max_tokens=10)
    assert (one.num_documents, one.num_targets) == (1, 39)


def test_a_document_that_does_not_end_as_the_others_is_refused_where_it_is_read(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, [3, 3, 3])
    shard.end_id = END
    assert Windows(shard, 100).rows(np.array([0])).boundaries.sum() == 3
    ids = np.fromfile(tmp_path / "s.bin", dtype="<i4")
    ids[8] = 7  # the end of document 2
    ids.tofile(tmp_path / "s.bin")
    shard = TokenShard(tmp_path / "s")
    shard.end_id = END
    assert Windows(shard, 4).rows(np.array([0])).tokens.tolist() == [[END, 1, 2, 3]]
    with pytest.raises(UserError, match=r"s\.bin, document 2 ends in id 7, not in the end token 0"):
        Windows(shard, 4).rows(np.array([2]))


@pytest.mark.parametrize("num_parts", [1, 3, 4, 7])
def test_parts_of_rows_make_the_rows_and_are_as_equal_as_can_be(tmp_path: Path, num_parts: int) -> None:
    windows = Windows(write_shard(tmp_path, [9, 4, 14]), 10)
    batch = windows.rows(np.arange(windows.num_windows))
    parts = [batch.part(index, num_parts) for index in range(num_parts)]
    assert len(batch.inputs) == 3
    for together, whole in zip(zip(*(part.inputs for part in parts), strict=True), batch.inputs, strict=True):
        assert torch.equal(torch.cat(together, dim=1), whole)
    lengths = [part.tokens.shape[1] for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert sum(part.num_targets for part in parts) == batch.num_targets


def test_spans_of_a_row_do_not_see_each_other(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, [2, 5])  # END 1 2 END 3 4 5 6 7 END
    row = read_rows([(shard, [Span(5, 2), Span(0, 3)])], 7)
    assert row.tokens.tolist() == [[4, 5, END, 1, 2, 0, 0]]
    assert row.targets.tolist() == [[5, 6, 1, 2, END, IGNORED_TARGET, IGNORED_TARGET]]
    assert row.boundaries.tolist() == [[False, False, True, False, False, False, False]]
    within = read_rows([(shard, [Span(0, 1), Span(5, 2)])], 3)
    assert within.boundaries.tolist() == [[True, True, False]]  # the rest of a long document is a span of its own
