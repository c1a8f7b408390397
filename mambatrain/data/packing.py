"""Best-fit packing: rows of whole documents, as few rows as that rule gives, computed once and kept beside the shard.

Each document goes, the longest first, into the fullest row that still has room for it (best-fit decreasing; for
language models: arXiv 2404.10830). A document longer than a row fills rows of its own, and what is left over of it is
packed like a document. No row mixes spans without a boundary between them.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.batches import MicroBatch, Span, read_rows
from mambatrain.data.token_shards import TokenShard
from mambatrain.files import sha256_of, write_bytes_whole

VERSION = 1  # of the rule and the file; another one is computed anew


class PackedWindows:
    """Rows of packed documents; the same face as `Windows`.

    Args:
        shard: what is packed.
        row_tokens: L.
        packing: (num_spans, 3) int64, sorted by row: the row of each span, its first input, its length.
    """

    def __init__(self, shard: TokenShard, row_tokens: int, packing: NDArray[np.int64]) -> None:
        self.shard = shard
        self.row_tokens = row_tokens
        self.num_windows = int(packing[-1, 0]) + 1 if len(packing) else 0
        self.num_targets = count_targets(shard, packing)
        self._packing = packing
        self._row_of_span = np.ascontiguousarray(packing[:, 0])

    def spans(self, window: int) -> list[Span]:
        """What the row of a window shows, in order; the rest of it is padding."""
        first, last = np.searchsorted(self._row_of_span, [window, window + 1])
        return [Span(int(start), int(length)) for _, start, length in self._packing[first:last]]

    def rows(self, windows: NDArray[np.int64]) -> MicroBatch:
        """The rows of some windows, in that order."""
        return read_rows([(self.shard, self.spans(int(window))) for window in windows], self.row_tokens)


def packing_files(prefix: Path, row_tokens: int) -> tuple[Path, Path]:
    """The array and its record, beside the shard."""
    stem = f"{prefix.name}.best_fit-{row_tokens}"
    return prefix.with_name(f"{stem}.npy"), prefix.with_name(f"{stem}.json")


def open_packing(shard: TokenShard, row_tokens: int, digest: str, may_write: bool = True) -> PackedWindows:
    """The packing of a shard: read where it was kept for the same tokens, else computed, and kept if allowed.

    Args:
        shard: what is packed.
        row_tokens: L.
        digest: of the tokens.
        may_write: keep what was computed; a folder that cannot be written is no error.
    """
    array_file, record_file = packing_files(shard.prefix, row_tokens)
    expected = {"format": "mambatrain packing", "version": VERSION, "row_tokens": row_tokens, "tokens": digest}
    kept = _read(array_file, record_file, expected)
    if kept is None:
        kept = pack_shard(shard, row_tokens)
        if may_write:
            _write(array_file, record_file, expected, kept)
    return PackedWindows(shard, row_tokens, kept)


def pack_shard(shard: TokenShard, row_tokens: int, num_documents: int | None = None) -> NDArray[np.int64]:
    """(num_spans, 3): the row of each span, its first input, its length; sorted by row.

    Args:
        shard: what is packed.
        row_tokens: L.
        num_documents: its first ones, the opening one included; None: all.
    """
    firsts, lengths = spans_of_documents(shard, num_documents)
    full, rest = np.divmod(lengths, row_tokens)
    # Whole rows of documents that are longer than one.
    which = np.repeat(np.arange(len(lengths)), full)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(full) - full, full)
    whole = np.stack([np.arange(len(which)), firsts[which] + nth * row_tokens, np.full(len(which), row_tokens)], axis=1)
    left = np.flatnonzero(rest)
    rows = best_fit_decreasing(rest[left], row_tokens)
    packed = np.stack([rows + len(which), firsts[left] + full[left] * row_tokens, rest[left]], axis=1)
    # Within a row in the order of the shard.
    packed = packed[np.lexsort((packed[:, 1], packed[:, 0]))]
    return np.concatenate([whole, packed]).astype(np.int64)


def best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The row of each piece: (num_pieces,), rows numbered as they are opened.

    Pieces of one length are placed together, so that the work grows with the capacity, not with their number. The
    result is that of placing one piece after the other, longest first, equal ones in their order.

    Args:
        lengths: (num_pieces,) in 1..capacity.
        capacity: of a row.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    rooms: dict[int, list[NDArray[np.int64]]] = {}  # room left -> rows, those opened first on top
    available = 0  # bit r is set where rooms[r] holds rows
    num_rows, placed = 0, 0
    for length, count in zip(*_run_lengths(lengths[order]), strict=True):
        while count:
            fitting = available >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            fits = min(room // length, count)  # the fullest row stays the fullest while more fits
            wanted = count // fits
            if fitting:
                taken = _take(rooms, room, wanted)
                if room not in rooms:
                    available &= ~(1 << room)
            else:
                taken = np.arange(num_rows, num_rows + wanted)
                num_rows += wanted
            num_pieces = len(taken) * fits
            rows[order[placed : placed + num_pieces]] = np.repeat(taken, fits)
            placed += num_pieces
            count -= num_pieces
            if left := room - fits * length:
                rooms.setdefault(left, []).append(taken)
                available |= 1 << left
    return rows


def _take(rooms: dict[int, list[NDArray[np.int64]]], room: int, wanted: int) -> NDArray[np.int64]:
    """Up to `wanted` rows that have `room` left, from those that got it last."""
    block = rooms[room].pop()
    if len(block) > wanted:
        rooms[room].append(block[wanted:])
        block = block[:wanted]
    if not rooms[room]:
        del rooms[room]
    return block


def _run_lengths(ordered: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Values of a sorted array, largest first, and how often each is there."""
    values, counts = np.unique(ordered, return_counts=True)
    return values[::-1].tolist(), counts[::-1].tolist()


def count_targets(shard: TokenShard, packing: NDArray[np.int64]) -> int:
    """Targets that count, over all rows."""
    if shard.counted is None:
        return int(packing[:, 2].sum())
    counted = shard.counted
    return sum(int(counted[first + 1 : first + length + 1].sum()) for _, first, length in packing.tolist())


def spans_of_documents(
    shard: TokenShard, num_documents: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First input and number of positions of each document that has any.

    Marked documents begin at the end token before them; the first of a shard that does not open with one begins at its
    own first token, as all do where none has an end token.
    """
    opening = shard.num_opening
    starts, lengths = shard.document_starts[opening:num_documents], shard.document_lengths[opening:num_documents]
    own_first = starts == 0 if shard.ends_marked else np.ones(len(starts), dtype=bool)
    firsts, positions = np.where(own_first, starts, starts - 1), np.where(own_first, lengths - 1, lengths)
    filled = positions > 0
    return firsts[filled], positions[filled]


def _read(array_file: Path, record_file: Path, expected: dict[str, object]) -> NDArray[np.int64] | None:
    """What was kept, mapped: processes share it. None: it is missing, damaged, or was computed for other tokens."""
    try:
        record = json.loads(record_file.read_bytes())
        if record != {**expected, "sha256": sha256_of(array_file)}:
            return None
        packing: NDArray[np.int64] = np.load(array_file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return packing


def _write(array_file: Path, record_file: Path, expected: dict[str, object], packing: NDArray[np.int64]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, packing, allow_pickle=False)
    content = buffer.getvalue()
    record = {**expected, "sha256": hashlib.sha256(content).hexdigest()}
    try:
        write_bytes_whole(array_file, content)
        write_bytes_whole(record_file, (json.dumps(record, indent=2) + "\n").encode())
    except OSError:
        return  # a folder of another's, or a full disk: it is computed again the next time
