"""MinHash against the sets themselves, on documents whose similarity is known."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mambatrain.data.near_duplicates import (
    NUM_HASHES,
    SHINGLE_WORDS,
    find_near_duplicates,
    hashes_of_band,
    signature_of,
)

pytest.importorskip("datasketch", reason="near-duplicates need the datasketch package")

THRESHOLD = 0.7


def shingles(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[first : first + SHINGLE_WORDS]) for first in range(len(words) - SHINGLE_WORDS + 1)}


def jaccard(first: list[str], second: list[str]) -> float:
    one, other = shingles(first), shingles(second)
    return len(one & other) / len(one | other)


def corpus() -> tuple[list[list[str]], list[bool]]:
    """120 unrelated documents, and behind each a copy with some words changed; whether a copy is truly near."""
    rng = random.Random(3)
    documents, near = [], []
    for number in range(120):
        words = [f"w{rng.randrange(5000)}" for _ in range(rng.randrange(150, 400))]
        copy = list(words)
        for _ in range(len(words) * (number % 10) // 100):
            copy[rng.randrange(len(copy))] = "changed"
        documents += [words, copy]
        near += [False, jaccard(words, copy) >= THRESHOLD]
    return documents, near


def signatures(documents: list[list[str]]) -> np.ndarray:
    return np.frombuffer(b"".join(map(signature_of, documents)), dtype="<u4").reshape(-1, NUM_HASHES)


def test_precision_and_recall_on_documents_of_known_similarity() -> None:
    documents, near = corpus()
    assert 30 < sum(near) < 100
    found = find_near_duplicates(signatures(documents), range(len(documents)), THRESHOLD)
    hits = sum(near[document] for document in found)
    assert hits / len(found) >= 0.9
    assert hits / sum(near) >= 0.9
    # Where it errs, the similarity lies within three standard errors of the threshold.
    for document in {*found} ^ {number for number, is_near in enumerate(near) if is_near}:
        assert abs(jaccard(documents[document - 1], documents[document]) - THRESHOLD) < 3 * 0.5 / NUM_HASHES**0.5


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_what_comparing_all_with_all_finds_is_found(threshold: float) -> None:
    documents, _ = corpus()
    all_signatures = signatures(documents)
    kept: list[int] = []
    expected = []
    for document, signature in enumerate(all_signatures):
        near = any((all_signatures[other] == signature).mean() >= threshold for other in kept)
        (expected if near else kept).append(document)
    found = find_near_duplicates(all_signatures, range(len(documents)), threshold)
    assert 12 <= len(expected) < len(documents) / 2 + 1
    assert set(found) <= set(expected)
    assert len(found) >= 0.99 * len(expected)


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.75, 0.8, 0.9, 0.95, 0.99])
def test_bands_are_as_long_as_they_may_be(threshold: float) -> None:
    """Shorter ones compare more than is needed, longer ones miss more than 1% of what is just similar enough."""
    hashes = hashes_of_band(threshold)
    missed = [(1 - threshold**width) ** (NUM_HASHES // width) for width in (hashes, hashes + 1)]
    assert missed[0] <= 0.01 < missed[1]


def test_the_estimate_is_that_of_the_sets() -> None:
    documents, _ = corpus()
    both = signatures(documents)
    errors = [
        (both[first] == both[first + 1]).mean() - jaccard(documents[first], documents[first + 1])
        for first in range(0, len(documents), 2)
    ]
    assert abs(float(np.mean(errors))) < 0.02
    assert float(np.std(errors)) < 0.06


def test_the_first_is_kept_and_chains_are_compared_with_what_is_kept() -> None:
    words = [f"w{number}" for number in range(200)]
    half = [*words[:170], *(f"x{number}" for number in range(30))]  # 0.69 of the first
    far = [*words[:140], *half[170:], *(f"y{number}" for number in range(30))]
    assert jaccard(words, far) < 0.6
    assert find_near_duplicates(signatures([words, words, half, words]), range(4), 0.9) == [1, 3]
    assert find_near_duplicates(signatures([words, words]), [1], 0.9) == []


def test_texts_of_few_or_no_words() -> None:
    few = signatures([["a"], ["a"], ["a", "b"], [], [], ["b", "a"]])
    assert find_near_duplicates(few, range(6), 0.5) == [1]
