"""Whose turn it is: sources in given proportions, to one row at any moment, as a function of the place alone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

MAX_PERIOD = 1_000_000  # places; 12 bytes each, and a microsecond or two once


class Interleaving:
    """A periodic order of sources. After n places, source i has had n * share_i of them, plus or minus less than 1.

    Each turn of a source has a window: the j-th (from 1) lies in places floor((j - 1) / share) .. ceil(j / share) - 1.
    Whichever source may and must go first goes; with shares that sum to 1 all windows are met (Baruah, Cohen, Plaxton,
    Varvel, "Proportionate progress", 1996; earliest deadline first on one processor).

    Args:
        weights: above 0, of any scale. Shares are exact where they have a common denominator up to MAX_PERIOD, else
            rounded to multiples of 1 / MAX_PERIOD.

    Attributes:
        shares: (num_sources,) exact; they sum to 1.
    """

    def __init__(self, weights: Sequence[float | int]) -> None:
        turns = whole_turns(weights)
        self.period = sum(turns)
        self.turns = np.array(turns, dtype=np.int64)
        self.shares = [Fraction(count, self.period) for count in turns]
        self._source = _earliest_deadline_first(turns)
        self._before = np.empty(self.period, dtype=np.int64)  # turns of the same source earlier in the period
        for source, count in enumerate(turns):
            self._before[self._source == source] = np.arange(count)

    def at(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each place, and which of its turns that is, from 0: (K,) each."""
        periods, within = np.divmod(places, self.period)
        sources = self._source[within].astype(np.int64)
        return sources, periods * self.turns[sources] + self._before[within]

    def turns_before(self, place: int) -> NDArray[np.int64]:
        """(num_sources,) turns that each source had in places 0 .. place - 1."""
        periods, within = divmod(place, self.period)
        return periods * self.turns + np.bincount(self._source[:within], minlength=len(self.turns))


def whole_turns(weights: Sequence[float | int]) -> list[int]:
    """Turns of each source in the shortest period that has the given proportions, or in MAX_PERIOD places."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    if total <= MAX_PERIOD:
        return counts
    turns = [max(count * MAX_PERIOD // total, 1) for count in counts]
    # The places left over go to those that rounding down took most from.
    lost = sorted(range(len(counts)), key=lambda index: (turns[index] * total - counts[index] * MAX_PERIOD, index))
    for index in lost[: max(MAX_PERIOD - sum(turns), 0)]:
        turns[index] += 1
    return turns


def _earliest_deadline_first(turns: Sequence[int]) -> NDArray[np.int32]:
    """(period,) the source of each place."""
    period = sum(turns)
    order = np.zeros(period, dtype=np.int32)
    if len(turns) == 1:
        return order
    done = [0] * len(turns)
    waiting = [(0, source) for source in range(len(turns))]  # by the place from which the next turn may be
    ready: list[tuple[int, int]] = []  # by the place before which it must be
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, source = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(done[source] + 1) * period // turns[source]), source))
        _, source = heapq.heappop(ready)
        order[place] = source
        done[source] += 1
        if done[source] < turns[source]:
            heapq.heappush(waiting, (done[source] * period // turns[source], source))
    return order
