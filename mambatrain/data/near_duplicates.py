"""Documents that are nearly the same: MinHash signatures by the datasketch package, and their comparison.

datasketch has an index, too, which by default misses a tenth of what is to be found (docs/benchmarks.md), and set to
miss as little as this one takes more than twice its memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mambatrain.errors import UserError

SHINGLE_WORDS = 5
NUM_HASHES = 128
"""The Jaccard similarity is estimated with a standard error of at most 0.5 / sqrt(128) = 0.044."""
SIGNATURE_BYTES = 4 * NUM_HASHES
_SEED, _SCHEME = 1, "affine32"


def check_datasketch() -> None:
    """
    Raises:
        UserError: the package is not installed.
    """
    try:
        import datasketch  # noqa: F401
    except ImportError:
        hint = "pip install 'mambatrain[near-duplicates]'"
        raise UserError("--near-duplicates needs the datasketch package", hint) from None


def signature_of(words: list[str]) -> bytes:
    """MinHash of a text's runs of SHINGLE_WORDS words, SIGNATURE_BYTES long; a text of fewer words is one run."""
    from datasketch import MinHash

    runs = {
        " ".join(words[first : first + SHINGLE_WORDS]).encode()
        for first in range(max(1, len(words) - SHINGLE_WORDS + 1))
    }
    minhash = MinHash(num_perm=NUM_HASHES, seed=_SEED, scheme=_SCHEME)
    if words:
        minhash.update_batch(sorted(runs))
    return np.asarray(minhash.hashvalues, dtype="<u4").tobytes()


def find_near_duplicates(signatures: NDArray[np.uint32], among: Iterable[int], threshold: float) -> list[int]:
    """Which documents are similar to one that stands before them and is kept itself.

    Two are compared where all hashes of a band of their signatures are equal (locality-sensitive hashing: Leskovec et
    al., "Mining of Massive Datasets", 3.4). What is equal by chance costs a comparison, no more.

    Args:
        signatures: (num_documents, NUM_HASHES) uint32.
        among: the documents to compare, in their order.
        threshold: estimated Jaccard similarity from which on two are nearly the same.
    """
    band_bytes = 4 * hashes_of_band(threshold)
    bands = [slice(end - band_bytes, end) for end in range(band_bytes, SIGNATURE_BYTES + 1, band_bytes)]
    empty = signature_of([])
    kept, found = array("q"), []
    newest: dict[int, int] = {}  # a band's hash -> its entry; entry n is of the kept document n // len(bands)
    before = array("q")  # entry -> the entry of the same hash before it, or -1
    for document in among:
        content = signatures[document].tobytes()
        if content == empty:
            continue
        entries = [newest.get(hash((place.start, content[place])), -1) for place in bands]
        others = {kept[entry // len(bands)] for first in entries for entry in _chain(first, before)}
        if any((signatures[other] == signatures[document]).mean() >= threshold for other in others):
            found.append(document)
            continue
        kept.append(document)
        for place, entry in zip(bands, entries, strict=True):
            newest[hash((place.start, content[place]))] = len(before)
            before.append(entry)
    return found


def hashes_of_band(threshold: float) -> int:
    """The most hashes that a band may have so that two documents of similarity `threshold` are compared, but for 1%."""

    def compared(hashes: int) -> float:
        return 1.0 - (1.0 - threshold**hashes) ** (NUM_HASHES // hashes)  # some band is equal

    return max((hashes for hashes in range(1, NUM_HASHES // 2) if compared(hashes) >= 0.99), default=1)


def _chain(entry: int, before: array[int]) -> Iterator[int]:
    while entry >= 0:
        yield entry
        entry = before[entry]
