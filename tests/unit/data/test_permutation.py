import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambatrain.data.permutation import permute


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_it_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


def test_one_index_alone_goes_where_it_goes_among_others() -> None:
    size = 10_007
    together = permute(np.arange(size), size, 3, 5)
    alone = [int(permute(np.array([index]), size, 3, 5)[0]) for index in range(0, size, 997)]
    assert alone == together[::997].tolist()


def test_seed_and_epoch_are_both_part_of_the_key() -> None:
    orders = [permute(np.arange(1000), 1000, seed, epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def test_it_looks_random() -> None:
    # The mean distance between neighbours of a random permutation of n is n / 3.
    order = permute(np.arange(30_000), 30_000, 0, 0)
    assert np.abs(np.diff(order)).mean() == pytest.approx(10_000, rel=0.02)


def test_a_corpus_of_a_trillion_windows_costs_no_memory() -> None:
    size = 10**12
    indices = np.arange(size - 1000, size)
    assert len(set(permute(indices, size, 1, 2).tolist())) == 1000


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.9"):
        permute(np.array([index]), 10, 0)
