"""How far the C library's heap grows for a sequence of tensors: bytes in use, and holes that none of them fitted.

Training on a CPU keeps the memory that tensors free (`devices.keep_freed_memory`), so the heap never shrinks and its
resident size is the furthest that it reached. glibc (malloc/malloc.c, 2.36) takes the smallest hole that is large
enough, cuts off what it does not need and joins neighbours that are free; where no hole is, what lies behind the last
block.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

HEADER = 8
GRAIN = 16
# For a tensor (posix_memalign) a hole must hold the alignment and a smallest chunk beside it, which are then given
# back: the hole that a tensor leaves is too small for the next one of its size, unless a neighbour is free, too.
BESIDE_ALIGNED = 64 + 32


class Heap:
    """Places and sizes alone; no memory is taken."""

    def __init__(self) -> None:
        self.reached = 0
        """Bytes, at the furthest."""
        self._end = 0  # behind the last block: what is free there is taken where no hole fits
        self._blocks: dict[int, tuple[int, int]] = {}  # block -> place and size
        self._holes: list[tuple[int, int]] = []  # (size, place), sorted: the best fit is found by bisection
        self._starts: dict[int, int] = {}  # place -> size of a hole
        self._ends: dict[int, int] = {}  # end -> place of a hole

    def take(self, block: int, num_bytes: int) -> None:
        """A tensor of so many bytes comes to life; `block` is any number that is not in use."""
        size = -(-(num_bytes + HEADER) // GRAIN) * GRAIN
        index = bisect_left(self._holes, (size + BESIDE_ALIGNED, -1))
        if index < len(self._holes):
            hole, place = self._holes[index]
            self._drop(place, hole)
            self._add(place + size, hole - size)
        else:
            place, self._end = self._end, self._end + size
            self.reached = max(self.reached, self._end + BESIDE_ALIGNED)
        self._blocks[block] = place, size

    def give(self, block: int) -> None:
        """The tensor dies."""
        place, size = self._blocks.pop(block)
        if (after := self._starts.get(place + size)) is not None:
            self._drop(place + size, after)
            size += after
        if (before := self._ends.get(place)) is not None:
            self._drop(before, place - before)
            size += place - before
            place = before
        if place + size == self._end:
            self._end = place
        else:
            self._add(place, size)

    def _add(self, place: int, size: int) -> None:
        insort(self._holes, (size, place))
        self._starts[place], self._ends[place + size] = size, place

    def _drop(self, place: int, size: int) -> None:
        del self._holes[bisect_left(self._holes, (size, place))], self._starts[place], self._ends[place + size]


def reach(requests: Iterable[tuple[int, int]]) -> int:
    """Bytes that a heap reaches for (block, bytes) in order; bytes below 0 give the block back."""
    heap = Heap()
    for block, num_bytes in requests:
        if num_bytes < 0:
            heap.give(block)
        else:
            heap.take(block, num_bytes)
    return heap.reached
