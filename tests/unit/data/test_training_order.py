from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mambatrain.data.batches import MicroBatch, Windows
from mambatrain.data.permutation import permute
from mambatrain.data.token_shards import TokenShard, TokenShardWriter
from mambatrain.data.training_order import OrderStage, Source, TrainingOrder


def write_windows(folder: Path, name: str, num_windows: int, row_tokens: int = 8) -> Windows:
    with TokenShardWriter(folder / name, np.dtype("<i4")) as writer:
        writer.append(np.array([0]))
        for index in range(num_windows):
            writer.append(np.append(np.full(row_tokens - 1, index + 1), 0))
    windows = Windows(TokenShard(folder / name), row_tokens)
    assert windows.num_windows == num_windows
    return windows


@pytest.fixture
def simple(tmp_path: Path) -> TrainingOrder:
    return TrainingOrder([OrderStage(0, 6, [Source("a", write_windows(tmp_path, "a", 31))])], seed=3)


@pytest.fixture
def mixture(tmp_path: Path) -> TrainingOrder:
    """Three sources, the proportions of which change at draw 7; one comes back, one goes, and b is renamed nowhere."""
    a, b, c = (write_windows(tmp_path, name, size) for name, size in (("a", 40), ("b", 9), ("c", 9)))
    first = OrderStage(0, 6, [Source("a", a, 0.7), Source("b", b, 0.3)])
    second = OrderStage(7, 6, [Source("b", b, 1), Source("c", c, 2), Source("a", a, 2)])
    return TrainingOrder([first, second], seed=3)


def test_the_order_of_one_source_is_the_permutation_of_its_windows(simple: TrainingOrder) -> None:
    size = simple.stages[0].sources[0].windows.num_windows
    drawn = [row.window for draw in range(20) for row in simple.rows_of(draw)]
    for epoch in range(3):
        assert drawn[epoch * size : (epoch + 1) * size] == permute(np.arange(size), size, 3, epoch).tolist()


def test_an_epoch_of_each_source_shows_each_of_its_windows_once_across_stages(mixture: TrainingOrder) -> None:
    shown: dict[str, list[int]] = {name: [] for name in mixture.names}
    for draw in range(60):
        for row in mixture.rows_of(draw):
            windows = row.source.windows.num_windows
            assert row.epoch == len(shown[row.source.name]) // windows
            shown[row.source.name].append(row.window)
    for name, windows in shown.items():
        size = {"a": 40, "b": 9, "c": 9}[name]
        assert len(windows) > 2 * size
        epochs = [windows[i : i + size] for i in range(0, len(windows) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert shown["b"][:9] != shown["c"][:9]  # of one size, and yet not in one order


def test_proportions_hold_to_one_row_after_every_row_of_a_stage(mixture: TrainingOrder) -> None:
    for first, last, shares in ((0, 7, {"a": 0.7, "b": 0.3}), (7, 60, {"a": 0.4, "b": 0.2, "c": 0.4})):
        assert mixture.shares_of(first) == pytest.approx(shares)
        names = [row.source.name for draw in range(first, last) for row in mixture.rows_of(draw)]
        counts = Counter[str]()
        for place, name in enumerate(names, start=1):
            counts[name] += 1
            assert all(abs(counts[name] - share * place) < 1 for name, share in shares.items())


def test_what_was_drawn_is_known_without_drawing(mixture: TrainingOrder) -> None:
    counts = Counter[str]()
    sizes = {"a": 40, "b": 9, "c": 9}
    for draw in range(30):
        epochs = mixture.drawn_until(draw)
        assert epochs == pytest.approx({name: counts[name] / size for name, size in sizes.items()})
        assert {name: rows for (name, _), rows in mixture.rows_until(draw).items() if rows} == +counts
        of_draw = mixture.rows_by_source(draw)
        assert sum(of_draw.values()) == 6
        counts.update(of_draw)


def test_a_draw_does_not_depend_on_what_was_asked_before(mixture: TrainingOrder, tmp_path: Path) -> None:
    forwards = [mixture.rows_of(draw) for draw in range(20)]
    fresh = TrainingOrder(mixture.stages, seed=3)
    assert [fresh.rows_of(draw) for draw in reversed(range(20))] == forwards[::-1]
    assert [TrainingOrder(mixture.stages, seed=4).rows_of(draw) for draw in range(20)] != forwards


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4])
@pytest.mark.parametrize("draw", [4, 9])
def test_ranks_and_micro_batches_split_a_draw_without_changing_it(
    mixture: TrainingOrder, num_ranks: int, micro_batch_rows: int, draw: int
) -> None:
    rows = [row.source.windows.rows(np.array([row.window])) for row in mixture.rows_of(draw)]
    parts = [p for rank in range(num_ranks) for p in mixture.micro_batches(draw, micro_batch_rows, rank, num_ranks)]
    for field in ("tokens", "boundaries", "targets"):  # only rows of pairs have references
        together = torch.cat([getattr(part, field) for part in parts])
        assert torch.equal(together, torch.cat([getattr(row, field) for row in rows]))
    assert max(len(part.tokens) for part in parts) <= micro_batch_rows


def shown_windows(batches: list[MicroBatch]) -> Counter[int]:
    """The windows of `write_windows` that rows show: the first of them begins with 1, the next with 2, ..."""
    return Counter(int(row[1]) - 1 for batch in batches for row in batch.tokens)


@pytest.mark.parametrize("ranks_after", [1, 2, 4])
@pytest.mark.parametrize("ranks_before", [1, 2, 4])
def test_an_epoch_shows_every_window_once_over_all_ranks_wherever_it_was_interrupted(
    tmp_path: Path, ranks_before: int, ranks_after: int
) -> None:
    """Sources of 42 and 14 windows, 3 rows to 1: seven draws of eight rows are an epoch of both, to the row."""
    sizes = {"a": 42, "b": 14}
    names = {"a": 1000, "b": 2000}  # what tells the windows of one source from the other's

    def order() -> TrainingOrder:
        sources = []
        for name, size in sizes.items():
            with TokenShardWriter(tmp_path / name, np.dtype("<i4")) as writer:
                writer.append(np.array([0]))
                for index in range(size):
                    writer.append(np.append(np.full(7, names[name] + index + 1), 0))
            sources.append(Source(name, Windows(TokenShard(tmp_path / name), 8), size))
        return TrainingOrder([OrderStage(0, 8, sources)], seed=5)

    expected = Counter(names[name] + index for name, size in sizes.items() for index in range(size))
    num_draws = sum(sizes.values()) // 8
    for interrupted in range(num_draws):
        shown = Counter[int]()
        for first, last, num_ranks in ((0, interrupted, ranks_before), (interrupted, num_draws, ranks_after)):
            life = order()  # a process that knows nothing of the one before
            for draw in range(first, last):
                for rank in range(num_ranks):
                    batches = life.micro_batches(draw, 2, rank, num_ranks)
                    assert sum(len(batch.tokens) for batch in batches) == 8 // num_ranks
                    shown += shown_windows(batches)
        assert shown == expected


def test_rows_that_do_not_divide_into_ranks_are_refused(simple: TrainingOrder) -> None:
    with pytest.raises(ValueError, match="6 rows do not divide into 4 ranks"):
        simple.micro_batches(0, 1, 0, 4)


def test_a_stage_of_longer_rows_has_as_many_tokens_in_a_micro_batch_and_its_own_windows(tmp_path: Path) -> None:
    short, long = write_windows(tmp_path, "a", 20), None
    long = Windows(short.shard, 32)
    order = TrainingOrder(
        [
            OrderStage(0, 8, [Source("a", short)]),
            OrderStage(2, 2, [Source("a", long)]),
            OrderStage(4, 8, [Source("a", short)]),
        ],
        seed=0,
    )
    assert [tuple(batch.tokens.shape) for batch in order.micro_batches(1, 4)] == [(4, 8), (4, 8)]
    assert [tuple(batch.tokens.shape) for batch in order.micro_batches(2, 4)] == [(1, 32), (1, 32)]
    assert [tuple(batch.tokens.shape) for batch in order.micro_batches(2, 8)] == [(2, 32)]
    # The short windows of draws 0 and 1, and of draw 4, are one epoch: 16 and the first 4 of 8.
    seen = [row.window for draw in (0, 1, 4) for row in order.rows_of(draw)]
    assert sorted(seen[:20]) == list(range(20))
    assert order.drawn_until(6) == pytest.approx({"a": 32 / 20 + 4 / 5})
