"""A keyed permutation of 0..n-1 that is computed index by index: shuffling without a table of n entries."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Rounds of the Feistel network. Four make a pseudo-random permutation (Luby and Rackoff, 1988); two more for small n.
_NUM_ROUNDS = 6
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def permute(indices: NDArray[np.int64], size: int, *key: int) -> NDArray[np.int64]:
    """Where a permutation of 0..size-1 sends each index.

    A balanced Feistel network over the next even power of two; indices that leave the range walk on until they are
    back inside (cycle walking: at most 4 steps on average, and still a bijection).

    Args:
        indices: (K,) int64 in 0..size-1.
        size: n.
        key: whole numbers that choose the permutation, such as (seed, epoch).

    Raises:
        ValueError: an index lies outside.
    """
    if size < 1 or (len(indices) and not (indices.min() >= 0 and indices.max() < size)):
        raise ValueError(f"indices must lie in 0..{size - 1}")
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    round_keys = _round_keys(key)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, round_keys)
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _round_keys(key: tuple[int, ...]) -> NDArray[np.uint64]:
    state: NDArray[np.uint64] = np.arange(1, _NUM_ROUNDS + 1).astype(np.uint64)
    for part in key:
        state = _mix(state + np.uint64(part * int(_GOLDEN_RATIO) % 2**64))
    return state


def _feistel(values: NDArray[np.uint64], half_bits: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014); arithmetic modulo 2^64."""
    with np.errstate(over="ignore"):
        values = values + _GOLDEN_RATIO
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
