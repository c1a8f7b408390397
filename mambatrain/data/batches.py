"""Rows of tokens: contiguous windows of a shard or packed documents, with boundaries and targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambatrain.data.token_shards import TokenShard
from mambatrain.errors import UserError

IGNORED_TARGET = -100  # torch's convention for a target that does not count


class MicroBatch(NamedTuple):
    """Rows that go through the model together."""

    tokens: Tensor
    """(B, L) int64."""
    boundaries: Tensor
    """(B, L) bool, True where a document starts: at the end token of the one before, or at its first token."""
    targets: Tensor
    """(B, L) int64, the next token; IGNORED_TARGET where a position does not count."""
    references: Tensor | None = None
    """(B, 2) fp64, of rows that hold a pair of answers: what `TokenShard.references` has of each."""

    @property
    def num_targets(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORED_TARGET).sum())

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in self.inputs))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What there is of it, in this order: what an objective is called with."""
        return tuple(tensor for tensor in self if tensor is not None)

    def part(self, index: int, num_parts: int) -> MicroBatch:
        """Neighbouring positions of the same rows: part `index` of `num_parts`, as equal as they can be."""
        length = self.tokens.shape[1]
        here = slice(index * length // num_parts, (index + 1) * length // num_parts)
        tokens, boundaries, targets = (tensor[:, here].contiguous() for tensor in self[:3])
        return MicroBatch(tokens, boundaries, targets, self.references)


class Span(NamedTuple):
    """Neighbouring inputs of a row: tokens first .. first + length - 1 of the shard, each with the next as target."""

    first: int
    length: int


class Windows:
    """The contiguous windows of a shard's first `num_tokens` tokens: window w is read from token w * row_tokens on.

    A window reads row_tokens + 1 tokens, so neighbours share one: the last target of the first is the first input of
    the second, and every token but the shard's opening one is a target exactly once (where documents have no end
    token, every token but the first of each document). The last window is padded with positions that do not count.
    """

    def __init__(self, shard: TokenShard, row_tokens: int, num_tokens: int | None = None) -> None:
        self.shard = shard
        self.row_tokens = row_tokens
        self.num_tokens = shard.num_tokens if num_tokens is None else num_tokens
        self.num_positions = max(self.num_tokens - 1, 0)
        self.num_windows = -(-self.num_positions // row_tokens)

    @property
    def num_targets(self) -> int:
        """Targets that count, over all windows."""
        if self.shard.ends_marked:
            return self.num_positions
        # Distinct starts: an empty document begins where the next one does.
        return self.num_positions - len(np.unique(_starts_within(self.shard, Span(0, self.num_positions))))

    def spans(self, window: int) -> list[Span]:
        """What the row of a window shows, in order; the rest of it is padding."""
        first = window * self.row_tokens
        return [Span(first, min(self.row_tokens, self.num_positions - first))]

    def rows(self, windows: NDArray[np.int64]) -> MicroBatch:
        """The rows of some windows, in that order."""
        return read_rows([(self.shard, self.spans(int(window))) for window in windows], self.row_tokens)


def uncounted(batch: MicroBatch) -> MicroBatch:
    """The same rows without a target that counts."""
    return batch._replace(targets=torch.full_like(batch.targets, IGNORED_TARGET))


def read_rows(contents: Sequence[tuple[TokenShard, Sequence[Span]]], row_tokens: int) -> MicroBatch:
    """Rows of row_tokens positions, each made of spans of one shard, one behind the other.

    A boundary lies where a document starts, and where a span does that is not the row's first: nothing leaks from one
    span to the next. What no span fills does not count.

    Raises:
        UserError: an id lies outside the vocabulary, or a document does not end as the others do.
    """
    tokens = np.zeros((len(contents), row_tokens), dtype=np.int64)
    targets = np.full((len(contents), row_tokens), IGNORED_TARGET, dtype=np.int64)
    boundaries = np.zeros((len(contents), row_tokens), dtype=bool)
    for row, (shard, spans) in enumerate(contents):
        place = 0
        for span in spans:
            here = slice(place, place + span.length)
            seen = shard.tokens(span.first, span.first + span.length + 1).astype(np.int64)
            tokens[row, here], targets[row, here] = seen[:-1], seen[1:]
            boundaries[row, place + boundaries_of(shard, span)] = True
            if place:
                boundaries[row, place] = True
            before_start = _starts_within(shard, span) - 1 - span.first
            if not shard.ends_marked:
                targets[row, place + before_start] = IGNORED_TARGET
            elif shard.end_id is not None and (seen[before_start] != shard.end_id).any():
                raise _unended(shard, span, seen, before_start)
            if shard.counted is not None:
                of_targets = shard.counted[span.first + 1 : span.first + span.length + 1]
                targets[row, here][~of_targets] = IGNORED_TARGET
            place += span.length
    batch = MicroBatch(torch.from_numpy(tokens), torch.from_numpy(boundaries), torch.from_numpy(targets))
    if contents and all(shard.references is not None for shard, _ in contents):
        return batch._replace(references=torch.from_numpy(np.stack([_references(*content) for content in contents])))
    return batch


def _references(shard: TokenShard, spans: Sequence[Span]) -> NDArray[np.float64]:
    """Of the document that each span begins."""
    assert shard.references is not None
    return shard.references[np.searchsorted(shard.document_starts, [span.first for span in spans])]


def boundaries_of(shard: TokenShard, span: Span) -> NDArray[np.int64]:
    """Which positions of a span are boundaries: (K,) ascending."""
    if shard.ends_marked:  # at the end token of the document before; nothing is before the shard's first
        opening = np.zeros(int(span.first == 0 and shard.num_opening == 0), dtype=np.int64)
        return np.union1d(opening, _starts_within(shard, span) - 1 - span.first)
    first, last = np.searchsorted(shard.document_starts, [span.first, span.first + span.length])
    return shard.document_starts[first:last] - span.first


def _starts_within(shard: TokenShard, span: Span) -> NDArray[np.int64]:
    """First tokens of documents among a span's targets."""
    bounds = [span.first + 1, span.first + span.length + 1]
    first, last = np.searchsorted(shard.document_starts, bounds)
    return shard.document_starts[first:last]


def _unended(shard: TokenShard, span: Span, seen: NDArray[np.int64], before_start: NDArray[np.int64]) -> UserError:
    wrong = before_start[seen[before_start] != shard.end_id][0]
    document = int(np.searchsorted(shard.document_starts, span.first + wrong, side="right")) - 1
    return UserError(
        f"{shard.file}, document {document:,} ends in id {seen[wrong]}, not in the end token {shard.end_id}",
        f"`mambatrain data check {shard.prefix}` names every such document",
    )
