"""Token shards: Megatron's indexed dataset (MMIDIDX, version 1), a pair of files `PREFIX.bin` and `PREFIX.idx`.

`.bin` holds the token ids of all documents, one behind the other. `.idx` holds, little-endian and unaligned:

    9 bytes   magic "MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     dtype code of `.bin`
    uint64    S, number of sequences
    uint64    N + 1, where N is the number of documents
    int32     (S,) tokens of each sequence
    int64     (S,) byte at which each begins in `.bin`
    int64     (N + 1,) first sequence of each document, and S at the end

Here a document is one sequence; shards of other tools may cut documents into several.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mambatrain.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}.items()
}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}
_MAX_DOCUMENT_TOKENS = 2**31 - 1  # lengths are int32
_WRITE_BUFFER_BYTES = 1 << 20
_KEPT_BYTES = 1 << 26  # of a shard, after which what was read of it is given back to the system
_FAULT_BYTES = 1 << 21  # that one id may bring into memory: a huge page of the system's cache


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype of a shard's ids: uint16 where every id fits, else int32."""
    return np.dtype("<u2") if vocab_size < 65_536 else np.dtype("<i4")


def shard_files(prefix: Path) -> tuple[Path, Path]:
    """`.bin` and `.idx` of a prefix (which may have dots of its own)."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


class TokenShard:
    """A shard, memory-mapped for reading.

    Args:
        prefix: path without `.bin` or `.idx`.
        vocab_size: ids that are read must lie below it; None: any id may come.

    Attributes:
        end_id: the id that ends every document, None where it is not known. Whoever opens a shard sets it.
        ends_marked: whether every document ends in an end token. Where not, a document begins at its first token, and
            nothing stands between it and the one before.
        counted: (num_tokens,) bool, the tokens that are trained on; None: all of them. Whoever opens a shard sets it.
        references: (num_documents,) fp64, of preference pairs the log-probability in nats that the reference gives to
            what counts of each; None: not known, or no pairs. Whoever trains on pairs sets it.
        dtype: of the ids on disk.
        num_tokens, num_documents: all of them, end tokens included.
        document_lengths: (num_documents,) int64, tokens of each document.
        document_starts: (num_documents,) int64, index of each document's first token.

    Raises:
        UserError: a file is missing, truncated, or not what its size and its other half say.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None = None) -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self._bytes_read = 0
        self.end_id: int | None = None
        self.ends_marked = True
        self.counted: NDArray[np.bool_] | None = None
        self.references: NDArray[np.float64] | None = None
        self.file, index = shard_files(self.prefix)
        for file in (self.file, index):
            if not file.is_file():
                raise UserError(f"{file} does not exist", "a shard is a .bin and an .idx file of one name")
        self.dtype, lengths, documents = _read_index(index)
        ends = np.cumsum(lengths, dtype=np.int64)
        self.num_tokens = int(ends[-1]) if len(ends) else 0
        expected = self.num_tokens * self.dtype.itemsize
        if self.file.stat().st_size != expected:
            raise UserError(
                f"{self.file} has {self.file.stat().st_size:,} bytes where its index says {expected:,}",
                "it was truncated or belongs to another index; copy both files again or make them again",
            )
        self.document_starts: NDArray[np.int64] = np.concatenate([[0], ends])[documents[:-1]]
        self.document_lengths: NDArray[np.int64] = np.diff(self.document_starts, append=self.num_tokens)
        self.num_documents = len(self.document_starts)
        self._tokens: NDArray[Any] = (
            np.memmap(self.file, dtype=self.dtype, mode="r") if self.num_tokens else np.empty(0, self.dtype)
        )

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Ids start .. stop - 1 of the whole shard: (stop - start,), a view of the file in its own dtype.

        Convert before calculating: uint16 wraps around.

        Raises:
            IndexError: the span does not lie in the shard.
            UserError: an id is outside the vocabulary: the file is damaged or belongs to another tokenizer.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        ids = self.raw_tokens(start, stop)
        if self.vocab_size is not None and stop > start and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            bad = start + int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
            raise UserError(
                f"{self.file}: token {bad} has id {self._tokens[bad]}, beyond the {self.vocab_size} of the tokenizer",
                "the file is damaged or belongs to another tokenizer; make it again",
            )
        return ids

    def _count_read(self, num_bytes: int) -> None:
        """Gives pages back now and then, so that a pass over a shard takes no memory; views of them stay valid."""
        self._bytes_read += num_bytes
        if self._bytes_read > _KEPT_BYTES:
            self._bytes_read = 0
            mapped = getattr(self._tokens, "_mmap", None)
            if mapped is not None:
                mapped.madvise(mmap.MADV_DONTNEED)  # of a file: they are read again from it, or from the system's cache

    def raw_tokens(self, start: int, stop: int) -> NDArray[Any]:
        """As `tokens`, whatever ids the file holds."""
        self._count_read((stop - start) * self.dtype.itemsize)
        return np.asarray(self._tokens[start:stop])

    @property
    def num_opening(self) -> int:
        """1 where document 0 is a lone end token that opens the shard and belongs to no text, else 0."""
        lone = self.ends_marked and self.num_documents > 0 and self.document_lengths[0] == 1
        return int(lone and (self.end_id is None or int(self._tokens[0]) == self.end_id))

    def document(self, index: int) -> NDArray[Any]:
        """All tokens of a document, as `tokens` gives them."""
        start = int(self.document_starts[index])
        return self.tokens(start, start + int(self.document_lengths[index]))

    def last_ids(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """The last id of each of some documents, none of which may be empty: (len(documents),) int64."""
        places = self.document_starts[documents] + self.document_lengths[documents] - 1
        ids = np.empty(len(places), dtype=np.int64)
        at_once = _KEPT_BYTES // _FAULT_BYTES
        for first in range(0, len(places), at_once):
            here = slice(first, first + at_once)
            self._count_read(len(places[here]) * _FAULT_BYTES)
            ids[here] = self._tokens[places[here]]
        return ids


class TokenShardWriter:
    """Writes a shard document by document; in memory are a buffer and the documents' lengths (4 bytes each).

    As a context manager it writes the index when the block ends well, and only closes the file when it does not.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any]) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_tokens = 0
        self._lengths = array("i")
        self._code = _CODE_OF_DTYPE[self.dtype]
        self._file = shard_files(self.prefix)[0].open("wb", buffering=_WRITE_BUFFER_BYTES)

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write_index()
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            _close_despite_full_disk(self._file, told=kind is not None)

    def append(self, ids: NDArray[Any]) -> None:
        """Adds one document, all of its tokens: (num_tokens,) of any integer dtype, every id within `dtype`."""
        if len(ids) > _MAX_DOCUMENT_TOKENS:
            raise UserError(
                f"a document has {len(ids):,} tokens, more than the {_MAX_DOCUMENT_TOKENS:,} that a shard can tell",
                "split it into several documents",
            )
        self._file.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self._lengths.append(len(ids))
        self.num_tokens += len(ids)

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        with shard_files(self.prefix)[1].open("wb") as file:
            file.write(_HEADER.pack(MAGIC, 1, self._code, len(lengths), len(lengths) + 1))
            file.write(lengths.astype("<i4").data)
            file.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8").data)
            file.write(np.arange(len(lengths) + 1, dtype="<i8").data)
            file.flush()
            os.fsync(file.fileno())


def _read_index(index: Path) -> tuple[np.dtype[Any], NDArray[np.int64], NDArray[np.int64]]:
    """dtype of the ids, tokens of each sequence (S,), first sequence of each document and S (N + 1,)."""
    damaged = "it was truncated or changed; copy it again or make it again"
    with index.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or header[:9] != MAGIC:
            raise UserError(f"{index} is not an index of token shards (MMIDIDX)", damaged)
        _, version, code, num_sequences, num_entries = _HEADER.unpack(header)
        dtype = _DTYPE_OF_CODE.get(code)
        if version != 1 or dtype is None:
            raise UserError(
                f"{index} has version {version} and dtype code {code}; known are version 1 and 1 to 8", damaged
            )
        if dtype.kind == "f":
            raise UserError(f"{index} says that the ids are {dtype.name}, not whole numbers", damaged)
        expected = _HEADER.size + 12 * num_sequences + 8 * num_entries
        if index.stat().st_size != expected:
            raise UserError(f"{index} has {index.stat().st_size:,} bytes where its header says {expected:,}", damaged)
        lengths = np.fromfile(file, dtype="<i4", count=num_sequences).astype(np.int64)
        pointers = np.fromfile(file, dtype="<i8", count=num_sequences)
        documents = np.fromfile(file, dtype="<i8", count=num_entries)
    if not np.array_equal(pointers, (np.cumsum(lengths) - lengths) * dtype.itemsize) or (lengths < 0).any():
        raise UserError(f"{index}: the lengths of its sequences do not match their places", damaged)
    ordered = (
        len(documents) > 0 and documents[0] == 0 and documents[-1] == num_sequences and (np.diff(documents) >= 0).all()
    )
    if not ordered:
        raise UserError(f"{index}: the documents do not cover its sequences", damaged)
    return dtype, lengths, documents


def _close_despite_full_disk(file: Any, told: bool) -> None:
    """Closing writes what is buffered, which fails once more where a full disk was the error that is under way."""
    try:
        file.close()
    except OSError:
        if not told:
            raise
