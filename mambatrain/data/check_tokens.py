"""Whether tokens are what they should be: digests, ids inside the vocabulary, an end token behind every document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.open_tokens import Tokens
from mambatrain.data.progress import ByteProgress
from mambatrain.data.token_shards import TokenShard
from mambatrain.files import sha256_of

TOKENS_AT_ONCE = 1 << 22
MAX_NAMED = 20  # of each kind in each shard; all of them are counted


@dataclass(frozen=True)
class Problem:
    """Something wrong. `document` counts as the index of the shard does, from 0; None: about the file as a whole."""

    file: str
    document: int | None
    what: str

    def __str__(self) -> str:
        place = self.file if self.document is None else f"{self.file}, document {self.document:,}"
        return f"{place}: {self.what}"


@dataclass(frozen=True)
class Checked:
    """What `check_tokens` found.

    Attributes:
        problems: the first of each kind in each file.
        num_problems: all of them.
        not_checked: what could not be, because nothing says how it should be.
    """

    problems: tuple[Problem, ...]
    num_problems: int
    not_checked: tuple[str, ...]


def check_tokens(tokens: Tokens, vocab_size: int | None = None) -> Checked:
    """Reads every token once; memory does not grow with the corpus beyond its index.

    Args:
        tokens: open ones: that sizes, index and manifest fit each other is known.
        vocab_size: ids must lie below it; None: the manifest's, where there is one.
    """
    limit = vocab_size if vocab_size is not None else tokens.vocab_size
    problems = _changed_files(tokens)
    counted = len(problems)
    total = sum(shard.num_tokens * shard.dtype.itemsize for shard in tokens.shards.values())
    with ByteProgress("checking tokens", total) as progress:
        done = 0
        for shard in tokens.shards.values():
            for kind in (_outside(shard, limit, progress, done), _without_end(shard), _ends_within(tokens, shard)):
                for number, problem in enumerate(kind):
                    counted += 1
                    if number < MAX_NAMED:
                        problems.append(problem)
            done += shard.num_tokens * shard.dtype.itemsize
    return Checked(tuple(problems), counted, tuple(_not_checked(tokens, limit)))


def _changed_files(tokens: Tokens) -> list[Problem]:
    if tokens.corpus is None:
        return []
    return [
        Problem(str(tokens.corpus.folder / name), None, "not the bytes that were written: its digest is another")
        for name, record in tokens.corpus.manifest.files.items()
        if sha256_of(tokens.corpus.folder / name) != record.sha256
    ]


def _outside(shard: TokenShard, limit: int | None, progress: ByteProgress, done: int) -> Iterator[Problem]:
    """Documents with ids outside the vocabulary, each once, with the first such id."""
    last_named = -1
    for start, ids in _chunks(shard):
        progress.advance_to(done + start * shard.dtype.itemsize)
        bad = np.flatnonzero((ids < 0) | (ids >= limit)) if limit is not None else np.flatnonzero(ids < 0)
        for document, place in zip(*_first_in_each(shard, start + bad), strict=True):
            if document != last_named:  # a document may reach over several chunks
                known = "none is negative" if limit is None else f"the vocabulary has {limit:,}"
                at, bad_id = place - int(shard.document_starts[document]), int(ids[place - start])
                yield Problem(str(shard.file), document, f"its token {at:,} has id {bad_id}; {known}")
            last_named = document


def _without_end(shard: TokenShard) -> Iterator[Problem]:
    """Documents whose last token is not the end token; empty ones have none either."""
    if shard.end_id is None or not shard.num_documents:
        return
    empty = shard.document_lengths == 0
    for first in range(0, shard.num_documents, TOKENS_AT_ONCE):
        numbers = np.arange(first, min(first + TOKENS_AT_ONCE, shard.num_documents), dtype=np.int64)
        filled = numbers[~empty[numbers]]
        last = shard.last_ids(filled)
        wrong = {int(filled[row]): int(last[row]) for row in np.flatnonzero(last != shard.end_id)}
        for document in sorted([*wrong, *numbers[empty[numbers]].tolist()]):
            ends_in = f"ends in id {wrong[document]}" if document in wrong else "is empty"
            yield Problem(str(shard.file), document, f"{ends_in}, not in the end token {shard.end_id}")


def _ends_within(tokens: Tokens, shard: TokenShard) -> Iterator[Problem]:
    """Documents that hold the end token before their end: `tokenize` writes none; other tools may."""
    if shard.end_id is None or tokens.corpus is None:
        return
    last_named = -1
    for start, ids in _chunks(shard):
        places = start + np.flatnonzero(ids == shard.end_id)
        documents = _documents_of(shard, places)
        within = places != shard.document_starts[documents] + shard.document_lengths[documents] - 1
        for document, place in zip(*_first_in_each(shard, places[within]), strict=True):
            if document != last_named:
                at = place - int(shard.document_starts[document])
                what = f"holds the end token {shard.end_id} within, at its token {at:,}"
                yield Problem(str(shard.file), document, what)
            last_named = document


def _not_checked(tokens: Tokens, limit: int | None) -> Iterator[str]:
    if tokens.corpus is None:
        yield "digests: there is no manifest"
    if limit is None:
        yield "the vocabulary: its size is not known; --vocab-size names it"
    if any(shard.end_id is None for shard in tokens.shards.values()):
        yield "end tokens: the documents have none"


def _chunks(shard: TokenShard) -> Iterator[tuple[int, NDArray[Any]]]:
    for start in range(0, shard.num_tokens, TOKENS_AT_ONCE):
        yield start, shard.raw_tokens(start, min(start + TOKENS_AT_ONCE, shard.num_tokens))


def _documents_of(shard: TokenShard, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The document that each token lies in."""
    return np.searchsorted(shard.document_starts, places, side="right") - 1


def _first_in_each(shard: TokenShard, places: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Documents and the first of some ascending places in each."""
    documents, first = np.unique(_documents_of(shard, places), return_index=True)
    return documents.tolist(), places[first].tolist()
