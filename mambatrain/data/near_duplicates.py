"""Documents that are nearly the same: MinHash signatures and their comparison, through the datasketch package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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

    Args:
        signatures: (num_documents, NUM_HASHES) uint32.
        among: the documents to compare, in their order.
        threshold: estimated Jaccard similarity from which on two are nearly the same.
    """
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=NUM_HASHES)
    empty = np.frombuffer(signature_of([]), dtype="<u4")
    found = []
    for document in among:
        signature = signatures[document]
        if (signature == empty).all():
            continue
        minhash = _minhash(signature)
        if any((signatures[other] == signature).mean() >= threshold for other in index.query(minhash)):
            found.append(document)
        else:
            index.insert(document, minhash, check_duplication=False)
    return found


def _minhash(signature: NDArray[np.uint32]) -> Any:
    from datasketch import LeanMinHash

    return LeanMinHash(seed=_SEED, hashvalues=signature, scheme=_SCHEME)
