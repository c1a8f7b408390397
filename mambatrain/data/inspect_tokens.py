"""What tokens on disk hold: how many, in documents of which lengths, how often the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.open_tokens import Tokens
from mambatrain.data.permutation import permute
from mambatrain.data.progress import ByteProgress
from mambatrain.data.token_shards import TokenShard

HASH_BYTES = 16  # two of a billion different documents share a hash with a probability of 1e-21
PERCENTILES = (5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class ShardReport:
    """One shard in numbers; the lone end token that may open it counts nowhere.

    Attributes:
        num_tokens: end tokens included.
        num_text_tokens: without the token that ends each document.
        num_bytes: UTF-8 bytes of the text; None: not known.
        num_duplicates: documents that an earlier one of this shard equals to the token.
        num_duplicate_groups: different documents that appear more than once.
        num_also_in_train: documents that equal one of the training shard; 0 for that shard itself.
        lengths: (num_documents,) int64, text tokens of each document.
    """

    file: str
    dtype: str
    num_documents: int
    num_empty: int
    num_tokens: int
    num_text_tokens: int
    num_bytes: int | None
    num_duplicates: int
    num_duplicate_groups: int
    num_also_in_train: int
    lengths: NDArray[np.int64]

    @property
    def bytes_per_token(self) -> float | None:
        """Of text, end tokens left out."""
        return self.num_bytes / self.num_text_tokens if self.num_bytes and self.num_text_tokens else None

    def as_json(self) -> dict[str, Any]:
        """The numbers; of the lengths their percentiles and the histogram."""
        edges, counts = length_histogram(self.lengths)
        names = ("file", "dtype", "num_documents", "num_empty", "num_tokens", "num_text_tokens", "num_bytes")
        copies = ("num_duplicates", "num_duplicate_groups", "num_also_in_train")
        return {
            **{name: getattr(self, name) for name in names},
            "bytes_per_token": self.bytes_per_token,
            **{name: getattr(self, name) for name in copies},
            "document_tokens": length_summary(self.lengths),
            "histogram": [
                {"from": int(first), "below": int(below), "documents": int(count)}
                for first, below, count in zip(edges, edges[1:], counts, strict=False)
            ],
        }


def inspect_tokens(tokens: Tokens) -> dict[str, ShardReport]:
    """Split -> its report; every token is read once, in memory are 40 bytes a document."""
    total = sum(shard.num_tokens * shard.dtype.itemsize for shard in tokens.shards.values())
    reports: dict[str, ShardReport] = {}
    seen: NDArray[np.bytes_] | None = None  # of the training shard
    with ByteProgress("reading documents", total) as progress:
        done = 0
        for split, shard in tokens.shards.items():
            hashes = _hash_documents(shard, progress, done)
            done += shard.num_tokens * shard.dtype.itemsize
            distinct, counts = np.unique(hashes, return_counts=True)
            first = shard.num_opening
            lengths = _text_lengths(shard)[first:]
            text_bytes = tokens.text_bytes(split)
            reports[split] = ShardReport(
                file=str(shard.file),
                dtype=shard.dtype.name,
                num_documents=shard.num_documents - first,
                num_empty=int((lengths == 0).sum()),
                num_tokens=shard.num_tokens - first,
                num_text_tokens=int(lengths.sum()),
                num_bytes=None if text_bytes is None else int(text_bytes.sum()),
                num_duplicates=len(hashes) - len(distinct),
                num_duplicate_groups=int((counts > 1).sum()),
                num_also_in_train=0 if seen is None else int(np.isin(hashes, seen).sum()),
                lengths=lengths,
            )
            seen = distinct if seen is None else seen
    return reports


def length_summary(lengths: NDArray[np.int64]) -> dict[str, float]:
    """Smallest, mean, percentiles and largest; empty where there is no document."""
    if not len(lengths):
        return {}
    percentiles = np.percentile(lengths, PERCENTILES).tolist()
    shown = {f"p{name}": round(value, 1) for name, value in zip(PERCENTILES, percentiles, strict=True)}
    return {"min": int(lengths.min()), "mean": round(float(lengths.mean()), 1), **shown, "max": int(lengths.max())}


def length_histogram(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Edges (K + 1,) and counts (K,) of documents by length: 0, then from each power of two to below the next.

    Empty bins at both ends are left out.
    """
    if not len(lengths):
        return np.array([0, 1]), np.array([0])
    bins = np.where(lengths > 0, np.frexp(lengths.astype(np.float64))[1], 0)  # 1 -> 1, 2..3 -> 2, 4..7 -> 3
    first, last = int(bins.min()), int(bins.max())
    edges = np.array([0, *(2**power for power in range(last + 1))], dtype=np.int64)
    return edges[first : last + 2], np.bincount(bins, minlength=last + 1)[first:]


def sample_documents(shard: TokenShard, count: int, seed: int = 0) -> list[int]:
    """Some documents of text, drawn without repetition."""
    first = shard.num_opening
    num_documents = shard.num_documents - first
    if num_documents < 1:
        return []
    drawn = permute(np.arange(min(count, num_documents), dtype=np.int64), num_documents, seed)
    return [first + int(index) for index in drawn]


def _text_lengths(shard: TokenShard) -> NDArray[np.int64]:
    """(num_documents,) tokens of each document without the one that ends it."""
    return np.maximum(shard.document_lengths - 1, 0) if shard.ends_marked else shard.document_lengths


def _hash_documents(shard: TokenShard, progress: ByteProgress, done_bytes: int) -> NDArray[np.bytes_]:
    """(num_documents without the opening one,) of HASH_BYTES each."""
    first = shard.num_opening
    hashes = np.empty(shard.num_documents - first, dtype=f"S{HASH_BYTES}")  # compared whole: NumPy pads with zeros
    for row, document in enumerate(_documents(shard, first)):
        hashes[row] = hashlib.blake2b(np.ascontiguousarray(document).data, digest_size=HASH_BYTES).digest()
        if row % 256 == 0:
            progress.advance_to(done_bytes + int(shard.document_starts[first + row]) * shard.dtype.itemsize)
    return hashes


def _documents(shard: TokenShard, first: int) -> Iterator[NDArray[Any]]:
    """Every document from `first` on; ids are not checked: what is wrong with them is `check`'s to say."""
    stops = (shard.document_starts + shard.document_lengths).tolist()
    for start, stop in zip(shard.document_starts[first:].tolist(), stops[first:], strict=True):
        yield shard.raw_tokens(start, stop)
