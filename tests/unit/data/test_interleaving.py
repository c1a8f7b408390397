from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambatrain.data import interleaving
from mambatrain.data.interleaving import Interleaving, whole_turns

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=9)


@given(weights=WEIGHTS)
def test_at_any_place_every_source_has_had_its_share_to_less_than_one_row(weights: list[int]) -> None:
    order = Interleaving(weights)
    places = np.arange(2 * order.period + 3)
    sources, _ = order.at(places)
    had = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    for source, weight in enumerate(weights):
        share = Fraction(weight, sum(weights))
        assert order.shares[source] == share
        assert all(abs(int(count) - share * (place + 1)) < 1 for place, count in enumerate(had[:, source]))


@given(weights=WEIGHTS, first=st.integers(0, 10_000))
def test_turns_are_counted_without_looking_back(weights: list[int], first: int) -> None:
    order = Interleaving(weights)
    places = np.arange(first + 50)
    sources, turns = order.at(places)
    for source in range(len(weights)):
        assert turns[sources == source].tolist() == list(range(int((sources == source).sum())))
    alone = order.at(np.arange(first, first + 50))
    assert (alone[0] == sources[first:]).all()
    assert (alone[1] == turns[first:]).all()
    assert order.turns_before(first).tolist() == np.bincount(sources[:first], minlength=len(weights)).tolist()


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ([0.7, 0.3], [7, 3]),
        ([1, 1, 1], [1, 1, 1]),
        ([2, 4], [1, 2]),
        ([5], [1]),
        ([1e-1, 3e-1], [1, 3]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([6_000_000_000, 3_000_000_000], [2, 1]),
    ],
)
def test_weights_are_taken_as_they_are_written(weights: list[float], turns: list[int]) -> None:
    assert whole_turns(weights) == turns


def test_weights_without_a_short_period_are_rounded_to_a_millionth() -> None:
    weights = [0.123456789, 3.3333333333, 1e-12]
    turns = whole_turns(weights)
    assert sum(turns) == interleaving.MAX_PERIOD
    for weight, count in zip(weights[:2], turns[:2], strict=True):
        assert count / interleaving.MAX_PERIOD == pytest.approx(weight / sum(weights), abs=1.5e-6)
    assert turns[2] == 1
