"""What a draw shows, row by row, taken from the very batches that training reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mambatrain.data.batches import IGNORED_TARGET, Span
from mambatrain.data.document_streams import DocumentStreams
from mambatrain.data.token_shards import TokenShard
from mambatrain.data.training_order import TrainingOrder


@dataclass(frozen=True)
class ShownSpan:
    """Neighbouring tokens of a shard in a row.

    Attributes:
        place: position of its first input in the row.
        ids: its inputs, and the target of the last of them: one more than it has positions.
        boundaries: indices into `ids` of the inputs at which the state is reset, ascending.
        documents: of each boundary, the document that begins there.
        uncounted: indices into `ids` of the targets that do not count.
        first_document: the document that its first target belongs to.
    """

    place: int
    ids: list[int]
    boundaries: list[int]
    documents: list[int]
    uncounted: list[int]
    first_document: int


@dataclass(frozen=True)
class ShownRow:
    """One row of a draw.

    Attributes:
        slot: its place in the draw.
        tokens, targets, boundaries: (L,) as the model gets them; IGNORED_TARGET where a target does not count.
        num_padding: positions at its end that nothing fills.
        in_stream: whether it goes on where the row of this slot in the draw before ended (data.carry_state).
    """

    slot: int
    source: str
    window: int
    epoch: int
    tokens: list[int]
    targets: list[int]
    boundaries: list[bool]
    num_padding: int
    in_stream: bool
    spans: list[ShownSpan]

    def as_json(self) -> dict[str, Any]:
        """What the model gets; places of boundaries and of targets that do not count instead of the arrays."""
        return {
            "slot": self.slot,
            "source": self.source,
            "window": self.window,
            "epoch": self.epoch,
            "tokens": self.tokens,
            "targets": self.targets,
            "boundaries": [place for place, marked in enumerate(self.boundaries) if marked],
            "documents": sorted(self.documents),
            "num_padding": self.num_padding,
        }

    @property
    def documents(self) -> set[int]:
        """Every document of which the row shows something, as the shard's index counts them."""
        return {number for span in self.spans for number in (span.first_document, *span.documents)}


def rows_of_draw(order: TrainingOrder, draw: int, num_rows: int | None = None) -> list[ShownRow]:
    """The first rows of a draw (None: all), in the order of their slots, whichever rank would hold them."""
    drawn = order.rows_of(draw)[:num_rows]
    batches = order.micro_batches(draw, len(drawn) or 1)
    rows = [
        [tensor.tolist() for tensor in row]
        for batch in batches
        for row in zip(batch.tokens, batch.boundaries, batch.targets, strict=True)
    ]
    shown = []
    for slot, (row, (tokens, boundaries, targets)) in enumerate(zip(drawn, rows, strict=False)):
        shard, place, spans = row.source.windows.shard, 0, []
        for span in row.source.windows.spans(row.window):
            here = slice(place, place + span.length)
            spans.append(_show_span(shard, span, place, tokens[here], boundaries[here], targets[here]))
            place += span.length
        shown.append(
            ShownRow(
                slot=slot,
                source=row.source.name,
                window=row.window,
                epoch=row.epoch,
                tokens=tokens,
                targets=targets,
                boundaries=boundaries,
                num_padding=len(tokens) - place,
                in_stream=isinstance(row.source.windows, DocumentStreams),
                spans=spans,
            )
        )
    return shown


def _show_span(
    shard: TokenShard, span: Span, place: int, tokens: list[int], boundaries: list[bool], targets: list[int]
) -> ShownSpan:
    last = int(shard.tokens(span.first + span.length, span.first + span.length + 1)[0])
    at = [index for index, marked in enumerate(boundaries) if marked]
    # A document begins with the target of a boundary where end tokens lie between documents, else with its input.
    after = int(shard.ends_marked)
    return ShownSpan(
        place=place,
        ids=[*tokens, last],
        boundaries=at,
        documents=[_document_of(shard, span.first + index + after) for index in at],
        uncounted=[index + 1 for index, target in enumerate(targets) if target == IGNORED_TARGET],
        first_document=_document_of(shard, span.first + after),
    )


def _document_of(shard: TokenShard, place: int) -> int:
    return int(np.searchsorted(shard.document_starts, place, side="right")) - 1
