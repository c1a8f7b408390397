"""Row slots that follow documents: each token once an epoch, a document whole by one slot, a function of the draw."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mambatrain.data.document_streams import DocumentStreams
from mambatrain.data.drawn_rows import rows_of_draw
from mambatrain.data.permutation import permute
from mambatrain.data.token_shards import TokenShard, TokenShardWriter
from mambatrain.data.training_order import OrderStage, Source, TrainingOrder

ROW, SLOTS, END = 8, 3, 0
LENGTHS = [1, 30, 4, 9, 1, 50, 7, 8, 16, 3, 22]  # with the end token; the lone one in front opens the shard


def write_shard(folder: Path, lengths: list[int] = LENGTHS, ends_marked: bool = True) -> TokenShard:
    """Every id but the end token is its own place in the shard: it tells which token it is."""
    place = 0
    with TokenShardWriter(folder / f"{len(lengths)}-{ends_marked}", np.dtype("<i4")) as writer:
        for length in lengths:
            ids = np.arange(place, place + length) + 1000
            writer.append(np.append(ids[:-1], END) if ends_marked else ids)
            place += length
    shard = TokenShard(folder / f"{len(lengths)}-{ends_marked}")
    shard.ends_marked, shard.end_id = ends_marked, END if ends_marked else None
    return shard


def order_of(shard: TokenShard, seed: int = 3, slots: int = SLOTS) -> TrainingOrder:
    return TrainingOrder([OrderStage(0, slots, [Source("a", DocumentStreams(shard, ROW, slots, seed))])], seed)


def streams_shown(order: TrainingOrder, num_draws: int) -> list[tuple[list[int], list[bool], list[int]]]:
    """Inputs, boundaries and targets of each slot, one draw behind the other."""
    batches = [order.micro_batches(draw, 99)[0].inputs for draw in range(num_draws)]
    joined = [torch.cat(of_draws, dim=1).tolist() for of_draws in zip(*batches, strict=True)]
    return list(zip(*joined, strict=True))


@pytest.mark.parametrize("ends_marked", [True, False])
def test_a_slot_follows_each_document_from_its_beginning_to_its_end(tmp_path: Path, ends_marked: bool) -> None:
    shard = write_shard(tmp_path, ends_marked=ends_marked)
    starts = (shard.document_starts + 1000).tolist()
    lasts = (shard.document_starts + shard.document_lengths - 1 + 1000).tolist()
    for inputs, boundaries, targets in streams_shown(order_of(shard), 60):
        assert boundaries[0]
        for place in range(1, len(inputs)):
            if boundaries[place]:  # a document has just ended, and another begins with its first token
                assert targets[place - 1] in ([END] if ends_marked else lasts)
                first = targets[place] if ends_marked else inputs[place]
                assert first in starts or first == END
            else:
                assert inputs[place] == targets[place - 1]
        assert sum(boundaries) > 20, "no document was followed to its end"


@pytest.mark.parametrize("ends_marked", [True, False])
def test_every_token_is_a_target_once_an_epoch_and_slots_differ_by_one_document(
    tmp_path: Path, ends_marked: bool
) -> None:
    shard = write_shard(tmp_path, ends_marked=ends_marked)
    lengths = np.array(LENGTHS[1:]) if ends_marked else np.array([n - 1 for n in LENGTHS if n > 1])
    streams = order_of(shard).stages[0].sources[0].windows
    assert isinstance(streams, DocumentStreams)
    shown: dict[int, Counter[int]] = {0: Counter(), 1: Counter(), 2: Counter()}
    for slot in range(SLOTS):
        place = 0
        for window in range(slot, 60 * SLOTS, SLOTS):
            for span in streams.spans(window):
                epoch = streams._epoch_at(slot, place)  # a span that is not the row's first may be of the next one
                if epoch in shown:
                    shown[epoch].update(range(span.first + 1, span.first + span.length + 1))
                place += span.length
            assert place == (window // SLOTS + 1) * ROW, "a row is padded"
    wanted = set(range(1, shard.num_tokens))
    if not ends_marked:
        wanted -= set(shard.document_starts.tolist())
    for counts in shown.values():
        assert set(counts) == wanted
        assert set(counts.values()) == {1}
    for begins in streams._begins[1:]:
        assert begins.max() - begins.min() <= lengths.max()
        assert begins.sum() % lengths.sum() == 0


def test_documents_are_dealt_in_the_permuted_order_each_to_the_shortest_stream(tmp_path: Path) -> None:
    shard = write_shard(tmp_path)
    shown = streams_shown(order_of(shard), 60)
    firsts = [[t for t, marked in zip(targets, marks, strict=True) if marked] for _, marks, targets in shown]
    ends, dealt = [0] * SLOTS, [[] for _ in range(SLOTS)]  # type: ignore[var-annotated]
    for epoch in range(4):
        for index in permute(np.arange(len(LENGTHS) - 1), len(LENGTHS) - 1, 3, epoch).tolist():
            slot = ends.index(min(ends))
            start, length = int(shard.document_starts[index + 1]), LENGTHS[index + 1]
            dealt[slot].append(END if length == 1 else start + 1000)
            ends[slot] += length
    for found, wanted in zip(firsts, dealt, strict=True):
        assert found[: len(wanted)] == wanted[: len(found)]
        assert min(len(found), len(wanted)) > 8


def test_a_draw_does_not_depend_on_what_was_asked_before_nor_on_the_ranks(tmp_path: Path) -> None:
    shard = write_shard(tmp_path)
    forwards = [[batch.tolist() for batch in order_of(shard).micro_batches(draw, 99)[0].inputs] for draw in range(90)]
    order = order_of(shard)
    for draw in (89, 0, 40, 89, 7):
        parts = [part.inputs for rank in range(SLOTS) for part in order.micro_batches(draw, 1, rank, SLOTS)]
        assert [torch.cat(of_ranks).tolist() for of_ranks in zip(*parts, strict=True)] == forwards[draw]
    assert [[t.tolist() for t in order_of(shard, seed=4).micro_batches(d, 99)[0].inputs] for d in range(90)] != forwards


def test_a_document_at_the_very_first_token_of_a_shard_begins_with_a_boundary(tmp_path: Path) -> None:
    """Nothing stands before it that could be one, and what the slot was shown before must not leak into it."""
    shard = write_shard(tmp_path, [5, 8, 16])
    for inputs, boundaries, _ in streams_shown(order_of(shard, slots=1), 12):
        assert 1000 in inputs
        assert all(boundaries[place] for place, token in enumerate(inputs) if token == 1000)


def test_whether_another_document_began_since_a_draw(tmp_path: Path) -> None:
    order = order_of(write_shard(tmp_path))
    streams = order.stages[0].sources[0].windows
    assert isinstance(streams, DocumentStreams)
    marks = [boundaries for _, boundaries, _ in streams_shown(order, 40)]
    seen = set()
    for slot in range(SLOTS):
        for first, last in ((0, 1), (3, 4), (5, 9), (20, 21), (21, 22), (30, 33)):
            began = any(marks[slot][first * ROW : last * ROW + 1])  # or does, with the row itself
            assert streams.began_since(slot, first, last) == began
            seen.add(began)
    assert seen == {True, False}


def test_data_show_names_the_documents_of_a_row(tmp_path: Path) -> None:
    shard = write_shard(tmp_path)
    rows = rows_of_draw(order_of(shard), 2)
    assert [(row.slot, row.window, row.num_padding) for row in rows] == [(0, 6, 0), (1, 7, 0), (2, 8, 0)]
    for row in rows:
        starts, ids = shard.document_starts, [t - 1000 for t in row.targets if t != END]
        assert {int(np.searchsorted(starts, place, side="right")) - 1 for place in ids} <= row.documents
