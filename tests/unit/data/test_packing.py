from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambatrain.data import packing as module
from mambatrain.data.batches import IGNORED_TARGET
from mambatrain.data.packing import PackedWindows, best_fit_decreasing, open_packing, pack_shard, packing_files
from mambatrain.data.token_shards import TokenShard, TokenShardWriter


def plain_best_fit(lengths: list[int], capacity: int) -> Counter[int]:
    """One piece after the other, longest first, into the fullest row that has room: how full the rows are."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return Counter(map(sum, rows))


@given(lengths=st.lists(st.integers(1, 20), max_size=60), capacity=st.integers(20, 45))
def test_the_packing_is_that_of_the_plain_rule(lengths: list[int], capacity: int) -> None:
    rows = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    filled = np.bincount(rows, weights=lengths).astype(int).tolist()
    assert Counter(filled) == plain_best_fit(lengths, capacity)  # which of two rows alike is taken is left open


def test_a_million_pieces_are_packed_in_seconds() -> None:
    lengths = np.random.default_rng(0).geometric(1 / 300, 1_000_000).clip(1, 2048)
    rows = best_fit_decreasing(lengths, 2048)
    filled = np.bincount(rows, weights=lengths)
    assert filled.max() <= 2048
    assert lengths.sum() / (len(filled) * 2048) > 0.999


def write(folder: Path, lengths: list[int], marked: bool, opening: bool = True) -> TokenShard:
    """Documents of distinct ids 1, 2, 3, ..., `marked`: each followed by 0."""
    with TokenShardWriter(folder / "s", np.dtype("<i4")) as writer:
        if marked and opening:
            writer.append(np.array([0]))
        next_id = 1
        for length in lengths:
            writer.append(np.array([*range(next_id, next_id + length), *([0] if marked else [])]))
            next_id += length
    shard = TokenShard(folder / "s")
    shard.ends_marked = marked
    shard.end_id = 0 if marked else None
    return shard


@pytest.mark.parametrize(("marked", "opening"), [(True, True), (True, False), (False, False)])
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=15), row_tokens=st.integers(4, 16))
@settings(max_examples=60)
def test_rows_hold_whole_documents_and_every_target_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], row_tokens: int, marked: bool, opening: bool
) -> None:
    shard = write(tmp_path_factory.mktemp("p"), lengths, marked, opening)
    packed = PackedWindows(shard, row_tokens, pack_shard(shard, row_tokens))
    batch = packed.rows(np.arange(packed.num_windows))
    counted = batch.targets != IGNORED_TARGET
    firsts = set(np.cumsum([1, *lengths])[:-1].tolist())  # the first id of each document; of an empty one, the next's
    expected = Counter(range(1, sum(lengths) + 1))
    if marked:
        expected[0] = len(lengths)
        if not opening:  # nothing stands before the first token of all
            expected[1 if lengths[0] else 0] -= 1
    else:
        expected -= Counter(set(range(1, sum(lengths) + 1)) & firsts)
    assert Counter(batch.targets[counted].tolist()) == +expected
    assert packed.num_targets == int(counted.sum())
    # Within a row a token follows its neighbour, the end token closes a document, or there is a boundary.
    for tokens, boundaries, targets in zip(
        batch.tokens.tolist(), batch.boundaries.tolist(), batch.targets.tolist(), strict=True
    ):
        for place in range(1, row_tokens):
            if targets[place] != IGNORED_TARGET and not boundaries[place]:
                assert tokens[place] == targets[place - 1]
    # Only what is longer than a row is cut.
    rows_of_document: dict[int, set[int]] = {}
    for row, targets in enumerate(batch.targets.tolist()):
        for target in targets:
            if target > 0:
                rows_of_document.setdefault(int(np.searchsorted(np.cumsum(lengths), target)), set()).add(row)
    for document, rows in rows_of_document.items():
        positions = lengths[document] + 1 if marked else lengths[document] - 1
        assert len(rows) <= -(-positions // row_tokens)


def test_a_packing_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write(tmp_path, [3, 9, 4, 20], marked=True)
    first = open_packing(shard, 8, "digest of the tokens")
    files = packing_files(shard.prefix, 8)
    assert all(file.is_file() for file in files)
    before = [file.read_bytes() for file in files]

    computed = []
    monkeypatch.setattr(module, "pack_shard", lambda *arguments: computed.append(1) or pack_shard(*arguments))
    again = open_packing(shard, 8, "digest of the tokens")
    assert computed == []
    assert [again.spans(row) for row in range(again.num_windows)] == [
        first.spans(row) for row in range(first.num_windows)
    ]

    for break_it in (
        lambda: files[0].write_bytes(before[0][:-1] + b"\x07"),
        lambda: files[1].write_text(json.dumps({**json.loads(before[1]), "tokens": "others"})),
        lambda: files[1].write_text("{"),
        files[0].unlink,
    ):
        break_it()
        open_packing(shard, 8, "digest of the tokens")
        assert computed.pop() == 1
        assert [file.read_bytes() for file in files] == before
    open_packing(shard, 8, "digest of other tokens", may_write=False)
    assert computed == [1]
    assert [file.read_bytes() for file in files] == before


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "write_bytes_whole", refuse)
    assert open_packing(write(tmp_path, [3, 4], marked=True), 8, "d").num_windows == 2
    assert not packing_files(tmp_path / "s", 8)[0].exists()
