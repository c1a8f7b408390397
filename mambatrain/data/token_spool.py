"""The documents of a corpus on their way: encoded, in the order of the sources, continued where a process was stopped.

A folder of plain arrays that only grow, and a journal that tells how much of each is true. What was written behind the
journal's last entry is cut off when the folder is opened again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from mambatrain.data.cleaning import DIGEST_BYTES
from mambatrain.data.documents import Place
from mambatrain.data.encode_documents import EncodedBatch
from mambatrain.data.near_duplicates import NUM_HASHES, SIGNATURE_BYTES
from mambatrain.files import write_bytes_whole
from mambatrain.recipe.section import Section

JOURNAL_SECONDS = 10.0
"""The work that a kill can undo, at most, but for a single longer document. An entry waits for the disk."""
_JOURNAL = "journal.json"
_RECORD_BYTES = {"lengths": 8, "text_bytes": 8, "digests": DIGEST_BYTES, "signatures": SIGNATURE_BYTES}
"""Files with one record a document."""


class Progress(Section):
    """How far the sources were read.

    Attributes:
        counts: of documents, by the manifest's names for them.
        bad: the first documents that were left out.
    """

    num_files: int = 0
    num_units: int = 0
    bytes_read: int = 0
    counts: dict[str, int] = Field(default_factory=dict)
    bad: list[str] = Field(default_factory=list)

    @property
    def place(self) -> Place:
        """Where to go on."""
        return Place(self.num_files, self.num_units)


class Journal(Section):
    """What is true of a spool."""

    identity: str
    progress: Progress = Progress()
    num_documents: int = 0
    num_tokens: int = 0
    num_left_empty: int = 0
    """Documents of which the tokenizer left nothing."""
    complete: bool = False


def identity_of(facts: Mapping[str, Any]) -> str:
    """Digest of whatever decides the contents of a spool."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class TokenSpool:
    """Opens the spool in a folder, or begins one, where none is or it was made from something else.

    Args:
        dtype: of the ids.
        kept: which of `digests` and `signatures` the documents have.

    Attributes:
        continued: it holds what an earlier process did.
    """

    def __init__(self, folder: Path, identity: str, dtype: np.dtype[Any], kept: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.dtype = dtype
        self.sizes = {
            "tokens": dtype.itemsize,
            **{name: _RECORD_BYTES[name] for name in ("lengths", "text_bytes", *kept)},
        }
        folder.mkdir(parents=True, exist_ok=True)
        found = self._read_journal()
        self.continued = found is not None and found.identity == identity
        self.journal = found if found is not None and self.continued else Journal(identity=identity)
        self._open_tokens = 0  # of a document that is not whole yet
        self._files: dict[str, IO[bytes]] = {}
        self._last_entry = time.monotonic()

    def __enter__(self) -> Self:
        if not self.continued:
            (self.folder / _JOURNAL).unlink(missing_ok=True)
        for name in self.sizes:
            file = self._files[name] = (self.folder / name).open("ab")
            file.truncate(self._num_records(name) * self.sizes[name])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # a full disk once more, where it is the error that is under way
                if kind is None:
                    raise

    def add(self, batch: EncodedBatch[Progress]) -> None:
        """Appends a batch, and enters it in the journal when that is due."""
        kept = [number for number, length in enumerate(batch.lengths) if length]
        lengths = np.array([batch.lengths[number] for number in kept], dtype="<i8")
        if kept:
            lengths[0] += self._open_tokens
            self._open_tokens = 0
        self._open_tokens += batch.num_open
        documents = [batch.documents[number] for number in kept]
        self._write("tokens", batch.tokens.astype(self.dtype.newbyteorder("<"), copy=False).data)
        self._write("lengths", lengths.data)
        self._write("text_bytes", np.array([document.num_bytes for document in documents], dtype="<i8").data)
        for name, records in (
            ("digests", (document.digest for document in documents)),
            ("signatures", (document.signature for document in documents)),
        ):
            if name in self.sizes:
                self._write(name, b"".join(records))
        self.journal = self.journal.model_copy(
            update={
                "num_documents": self.journal.num_documents + len(kept),
                "num_tokens": self.journal.num_tokens + len(batch.tokens),
                "num_left_empty": self.journal.num_left_empty + len(batch.lengths) - len(kept),
                "progress": batch.mark or self.journal.progress,
            }
        )
        if batch.mark is not None and time.monotonic() - self._last_entry >= JOURNAL_SECONDS:
            self._enter()

    def complete(self) -> None:
        """All documents are there."""
        self.journal = self.journal.model_copy(update={"complete": True})
        self._enter()

    def read(self, name: str) -> NDArray[Any]:
        """What was written, memory-mapped, after the spool is closed.

        `tokens` (num_tokens,), `lengths` and `text_bytes` (num_documents,) int64, `digests` (num_documents,) bytes, or
        `signatures` (num_documents, NUM_HASHES) uint32.
        """
        dtypes: dict[str, Any] = {
            "tokens": self.dtype,
            "digests": f"V{DIGEST_BYTES}",
            "signatures": f"({NUM_HASHES},)<u4",
        }
        count = self._num_records(name)
        if not count:
            return np.empty(0, dtypes.get(name, "<i8"))
        return np.memmap(self.folder / name, dtype=dtypes.get(name, "<i8"), mode="r")[:count]

    def _write(self, name: str, content: Any) -> None:
        self._files[name].write(content)

    def _enter(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        write_bytes_whole(self.folder / _JOURNAL, self.journal.model_dump_json().encode())
        self._last_entry = time.monotonic()

    def _num_records(self, name: str) -> int:
        return self.journal.num_tokens if name == "tokens" else self.journal.num_documents

    def _read_journal(self) -> Journal | None:
        try:
            journal = Journal.model_validate_json((self.folder / _JOURNAL).read_bytes())
            sizes = {name: (self.folder / name).stat().st_size for name in self.sizes}
        except (OSError, ValidationError):
            return None
        enough = all(
            sizes[name] >= size * (journal.num_tokens if name == "tokens" else journal.num_documents)
            for name, size in self.sizes.items()
        )
        return journal if enough else None
