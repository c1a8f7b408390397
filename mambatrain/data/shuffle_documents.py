"""The encoded documents of a spool into shards: duplicates left out, shuffled, the last of the order held out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.manifest import CleaningOptions, ShardRecord, TokenizeOptions
from mambatrain.data.near_duplicates import find_near_duplicates
from mambatrain.data.permutation import permute
from mambatrain.data.progress import ByteProgress
from mambatrain.data.token_corpus import SPLITS
from mambatrain.data.token_shards import TokenShardWriter
from mambatrain.data.token_spool import TokenSpool
from mambatrain.files import fsync_file


@dataclass(frozen=True)
class Duplicates:
    """Which documents remain, (num_kept,) in the order of the sources, and how many were left out."""

    kept: NDArray[np.int64]
    num_exact: int
    num_near: int


def find_duplicates(spool: TokenSpool, cleaning: CleaningOptions) -> Duplicates:
    """Of documents with the same text the first remains, then of nearly the same the first."""
    num_documents = spool.journal.num_documents
    kept = np.arange(num_documents, dtype=np.int64)
    if cleaning.deduplicate:
        _, first = np.unique(spool.read("digests"), return_index=True)
        kept = np.sort(first).astype(np.int64)
    num_exact = num_documents - len(kept)
    if cleaning.near_duplicates is not None:
        near = find_near_duplicates(spool.read("signatures"), kept.tolist(), cleaning.near_duplicates)
        kept = np.setdiff1d(kept, np.array(near, dtype=np.int64), assume_unique=True)
    return Duplicates(kept, num_exact, num_documents - num_exact - len(kept))


def num_held_out(num_documents: int, fraction: float) -> int:
    """ceil(fraction * num_documents), exact in the decimal fraction; one document at least stays to train on."""
    return min(math.ceil(Fraction(str(fraction)) * num_documents), max(num_documents - 1, 0))


def write_shuffled(
    spool: TokenSpool, kept: NDArray[np.int64], end_id: int, options: TokenizeOptions, folder: Path
) -> tuple[ShardRecord, ShardRecord]:
    """The two shards and their bytes: the shuffled order's last documents are held out."""
    tokens, lengths, text_bytes = (spool.read(name) for name in ("tokens", "lengths", "text_bytes"))
    starts = np.cumsum(lengths) - lengths
    order = kept[permute(np.arange(len(kept), dtype=np.int64), len(kept), options.seed)]
    cut = len(kept) - num_held_out(len(kept), options.held_out)
    records: list[ShardRecord] = []
    with ByteProgress("shuffling documents", int(lengths[kept].sum()) * spool.dtype.itemsize) as progress:
        done = 0
        for split, indices in zip(SPLITS, (order[:cut], order[cut:]), strict=True):
            with TokenShardWriter(folder / split, spool.dtype) as writer:
                writer.append(np.array([end_id]))
                for start, length in zip(starts[indices].tolist(), lengths[indices].tolist(), strict=True):
                    writer.append(tokens[start : start + length])
                    progress.advance_to(done + writer.num_tokens * spool.dtype.itemsize)
            done += writer.num_tokens * spool.dtype.itemsize
            of_split = np.concatenate([[0], text_bytes[indices]]).astype("<i8")
            _write_array(folder / f"{split}.bytes.npy", of_split)
            num_bytes = int(of_split.sum())
            records.append(ShardRecord(num_documents=len(indices), num_tokens=writer.num_tokens, num_bytes=num_bytes))
    return records[0], records[1]


def _write_array(path: Path, values: NDArray[np.int64]) -> None:
    np.save(path, values, allow_pickle=False)
    fsync_file(path)
