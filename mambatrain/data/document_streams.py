"""Documents followed to their ends: each row slot has a stream of whole documents, of which a draw shows the next row.

In an epoch the documents come in the order of a keyed permutation, and each goes to the slot whose stream is the
shortest so far (the lowest of several); epochs follow each other without a gap. So slots differ by at most the longest
document, nothing is padded, and each document is shown once an epoch, by one slot, from its beginning to its end.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.batches import Span
from mambatrain.data.packing import spans_of_documents
from mambatrain.data.permutation import permute
from mambatrain.data.token_shards import TokenShard

_KEPT_EPOCHS = 3  # the slots are in at most two neighbouring ones where documents are shorter than an epoch


@dataclass(frozen=True)
class _Dealt:
    """The documents of an epoch: those of slot 0 in their order, then those of slot 1, ..."""

    edges: NDArray[np.int64]
    """(num_slots + 1,) where each slot's begin."""
    documents: NDArray[np.int64]
    """(num_documents,)"""
    places: NDArray[np.int64]
    """(num_documents,) the position of its slot's stream at which each begins."""


class DocumentStreams:
    """Window w is what slot w % num_slots shows in draw w // num_slots: there is no last one.

    A function of (seed, documents, slots, row length, window). Epochs are dealt one after the other when they are
    first asked for, about a second for a million documents.

    Args:
        shard: the documents; those without a target are left out.
        row_tokens: L.
        num_slots: rows of a step, over all devices.
        seed: key of the order.
    """

    def __init__(self, shard: TokenShard, row_tokens: int, num_slots: int, seed: int) -> None:
        self.shard = shard
        self.row_tokens = row_tokens
        self.num_slots = num_slots
        self.seed = seed
        self._firsts, self._lengths = spans_of_documents(shard)
        self.num_documents = len(self._firsts)
        self.num_windows = -(-int(self._lengths.sum()) // row_tokens)
        """Rows that an epoch fills, the last one in part."""
        self._begins = [np.zeros(num_slots, dtype=np.int64)]  # of each epoch, in each slot's stream
        self._dealt: dict[int, _Dealt] = {}

    def spans(self, window: int) -> list[Span]:
        """What the row of a window shows, in order; it is always full."""
        draw, slot = divmod(window, self.num_slots)
        place, end = draw * self.row_tokens, (draw + 1) * self.row_tokens
        spans = []
        while place < end:
            document, begin = self._document_at(slot, place)
            length = min(begin + int(self._lengths[document]), end) - place
            spans.append(Span(int(self._firsts[document]) + place - begin, length))
            place += length
        return spans

    def epoch_of(self, window: int) -> int:
        """The epoch of a window's first token."""
        draw, slot = divmod(window, self.num_slots)
        return self._epoch_at(slot, draw * self.row_tokens)

    def began_since(self, slot: int, first_draw: int, draw: int) -> bool:
        """Whether the document that a slot's row begins with is not the one that it was in before `first_draw`."""
        _, begin = self._document_at(slot, draw * self.row_tokens)
        return begin >= first_draw * self.row_tokens

    def _document_at(self, slot: int, place: int) -> tuple[int, int]:
        """The document at a position of a slot's stream, and the position at which it begins there."""
        dealt = self._dealt_in(self._epoch_at(slot, place))
        own = slice(dealt.edges[slot], dealt.edges[slot + 1])
        index = int(np.searchsorted(dealt.places[own], place, side="right")) - 1
        return int(dealt.documents[own][index]), int(dealt.places[own][index])

    def _epoch_at(self, slot: int, place: int) -> int:
        while self._begins[-1][slot] <= place:
            self._dealt_in(len(self._begins) - 1)
        return bisect_right(self._begins, place, key=lambda begins: begins[slot]) - 1

    def _dealt_in(self, epoch: int) -> _Dealt:
        if epoch not in self._dealt:
            while len(self._dealt) >= _KEPT_EPOCHS:
                self._dealt.pop(min(self._dealt))
            self._dealt[epoch] = self._deal(epoch)
        return self._dealt[epoch]

    def _deal(self, epoch: int) -> _Dealt:
        """Deals an epoch whose beginning is known; with it that of the next one is."""
        order = permute(np.arange(self.num_documents), self.num_documents, self.seed, epoch)
        heap = [(length, slot) for slot, length in enumerate(self._begins[epoch].tolist())]
        heapq.heapify(heap)
        slots, places = [], []
        for length in self._lengths[order].tolist():
            place, slot = heap[0]
            slots.append(slot)
            places.append(place)
            heapq.heapreplace(heap, (place + length, slot))
        if epoch == len(self._begins) - 1:
            self._begins.append(np.array([length for length, _ in sorted(heap, key=lambda entry: entry[1])]))
        by_slot = np.argsort(slots, kind="stable")
        return _Dealt(
            edges=np.searchsorted(np.array(slots)[by_slot], np.arange(self.num_slots + 1)),
            documents=order[by_slot],
            places=np.array(places)[by_slot],
        )
