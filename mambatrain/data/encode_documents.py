"""Documents into token ids on several threads, in the order of the documents, at bounded memory.

A batch is some pieces of consecutive documents, as `LoadedTokenizer.pieces` cuts them: many short documents, or a part
of a long one. Each thread encodes whole batches by itself. The tokenizers library lets go of Python's lock meanwhile,
and is told not to start threads of its own: those would wait for the longest text of every batch.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.cleaning import CleanDocument
from mambatrain.data.tokenizer import LoadedTokenizer
from mambatrain.errors import UserError

BATCH_CHARACTERS = 262_144
"""Text that a thread encodes at once: up to 30 MB of memory; short enough that threads finish together at the end."""
_PARALLELISM = "TOKENIZERS_PARALLELISM"

Mark = TypeVar("Mark")


@dataclass(frozen=True, slots=True)
class EncodedBatch(Generic[Mark]):
    """Tokens of consecutive documents.

    Attributes:
        tokens: (num_tokens,) in the dtype of the shard, an end token behind each document.
        documents: those that end in the batch.
        lengths: tokens of each of them in this batch, its end token included; 0: the tokenizer left nothing of it.
        num_open: tokens at the end of the batch that belong to a document that goes on in the next.
        mark: what `encode_documents` was told behind the batch's last document; None if that is not whole yet.
    """

    tokens: NDArray[Any]
    documents: list[CleanDocument]
    lengths: list[int]
    num_open: int
    mark: Mark | None


@dataclass(slots=True)
class _Batch(Generic[Mark]):
    pieces: list[str] = field(default_factory=list)
    continues: bool = False
    """Whether the first piece continues a document of the batch before."""
    documents: list[CleanDocument] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Of each of the documents: pieces up to its end."""
    last_origin: str = ""
    mark: Mark | None = None


def num_usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_documents(
    documents: Iterable[CleanDocument],
    loaded: LoadedTokenizer,
    dtype: np.dtype[Any],
    mark: Callable[[], Mark],
    num_workers: int,
    batch_characters: int = BATCH_CHARACTERS,
) -> Iterator[EncodedBatch[Mark]]:
    """Encodes documents as they come, a few batches ahead of what is asked for.

    Args:
        mark: called behind the last document of a batch, before the next is taken from `documents`: how far they are.
        num_workers: threads.

    Raises:
        UserError: a document is too long, or holds the end token.
    """
    waiting: deque[Future[EncodedBatch[Mark]]] = deque()
    with _no_threads_of_the_library(), ThreadPoolExecutor(num_workers, "tokenize") as workers:
        try:
            for batch in _batches(documents, loaded, mark, batch_characters):
                waiting.append(workers.submit(_encode, batch, loaded, dtype))
                if len(waiting) > num_workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _no_threads_of_the_library() -> Iterator[None]:
    """It looks at its variable on every call."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before


def _batches(
    documents: Iterable[CleanDocument], loaded: LoadedTokenizer, mark: Callable[[], Mark], batch_characters: int
) -> Iterator[_Batch[Mark]]:
    batch: _Batch[Mark] = _Batch()
    characters = 0
    for document in documents:
        batch.last_origin = document.origin
        for piece in _pieces(document, loaded):
            if characters >= batch_characters:  # in the middle of a document
                yield batch
                batch, characters = _Batch(continues=True, last_origin=document.origin), 0
            batch.pieces.append(piece)
            characters += len(piece)
        batch.documents.append(document._replace(text=""))  # a long text is not kept any longer than its pieces
        batch.ends.append(len(batch.pieces))
        if characters >= batch_characters or batch.continues:  # behind each long document there is a mark
            batch.mark = mark()
            yield batch
            batch, characters = _Batch(), 0
    batch.mark = mark()
    yield batch


def _pieces(document: CleanDocument, loaded: LoadedTokenizer) -> Iterator[str]:
    try:
        yield from loaded.pieces(document.text)
    except UserError as error:
        raise UserError(f"{document.origin}: {error.message}", error.hint) from None


def _encode(batch: _Batch[Mark], loaded: LoadedTokenizer, dtype: np.dtype[Any]) -> EncodedBatch[Mark]:
    encodings = loaded.tokenizer.encode_batch_fast(batch.pieces, add_special_tokens=False)
    pieces = [np.array(encoding.ids, dtype=dtype) for encoding in encodings]
    end = np.array([loaded.end_of_document_id], dtype=dtype)
    parts: list[NDArray[Any]] = []
    lengths: list[int] = []
    first, continues = 0, batch.continues
    for document, last in zip(batch.documents, batch.ends, strict=True):
        own = pieces[first:last]
        length = sum(map(len, own))
        for piece in own:
            _check_ids(piece, loaded, document.origin)
        lengths.append(length + 1 if length or continues else 0)
        parts += [*own, end] if lengths[-1] else []
        first, continues = last, False
    rest = pieces[first:]
    for piece in rest:
        _check_ids(piece, loaded, batch.last_origin)
    tokens = np.concatenate([*parts, *rest]) if parts or rest else np.empty(0, dtype)
    return EncodedBatch(tokens, batch.documents, lengths, sum(map(len, rest)), batch.mark)


def _check_ids(ids: NDArray[Any], loaded: LoadedTokenizer, origin: str) -> None:
    """An end token within a document would be taken for its end."""
    if (ids == loaded.end_of_document_id).any():
        raise UserError(
            f"{origin} holds {loaded.end_of_document} as text, and the tokenizer takes it for the token",
            f'mark the token as `"special": true` in {loaded.file}, or name another with --end-of-document',
        )
