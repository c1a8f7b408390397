"""What `data inspect` found and what `data show` shows, for people."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from mambatrain.data.drawn_rows import ShownRow
    from mambatrain.data.inspect_tokens import ShardReport
    from mambatrain.data.open_tokens import Tokens
    from mambatrain.data.tokenizer import LoadedTokenizer

SAMPLE_TOKENS = 160  # of each end of a sample document
BOUNDARY = "┃"  # where a document ends or begins


def inspection_lines(tokens: Tokens, reports: dict[str, ShardReport]) -> Iterator[str]:
    """Numbers and a histogram for each shard."""
    from mambatrain.data.inspect_tokens import length_histogram, length_summary
    from mambatrain.report.length_histogram import histogram_lines

    for split, report in reports.items():
        shard = tokens.shards[split]
        ends = "none: a document begins at its first token" if shard.end_id is None else f"id {shard.end_id}"
        empty = f", {report.num_empty:,} of them empty" if report.num_empty else ""
        yield f"{split}: {report.file} ({report.dtype})"
        yield f"  documents        {report.num_documents:,}{empty}"
        yield f"  tokens           {report.num_tokens:,}, of text {report.num_text_tokens:,}"
        yield f"  end token        {ends}"
        if report.bytes_per_token is None:
            yield "  bytes per token  not known: no manifest says how many bytes the text has"
        else:
            yield f"  bytes per token  {report.bytes_per_token:.3f} ({report.num_bytes:,} bytes of text)"
        groups = f" ({report.num_duplicate_groups:,} different ones)" if report.num_duplicates else ""
        yield f"  duplicates       {report.num_duplicates:,} equal an earlier document{groups}"
        if split != "train":
            yield f"  also in train    {report.num_also_in_train:,}"
        summary = length_summary(report.lengths)
        if summary:
            yield "  document tokens  " + ", ".join(f"{name} {value:,}" for name, value in summary.items())
            edges, counts = length_histogram(report.lengths)
            yield from (f"    {line}" for line in histogram_lines(edges.tolist(), counts.tolist()))


def sample_lines(tokens: Tokens, tokenizer: LoadedTokenizer | None, count: int) -> Iterator[str]:
    """Some training documents as text; without a tokenizer, as ids."""
    from mambatrain.data.inspect_tokens import sample_documents

    shard = tokens.train
    for index in sample_documents(shard, count):
        ids = shard.document(index).tolist()
        text_ids = ids[:-1] if shard.ends_marked else ids
        yield ""
        yield f"document {index:,} of {shard.file}, {len(text_ids):,} tokens of text"
        shown = _text(tokenizer, text_ids)
        end = f"{BOUNDARY}{_text(tokenizer, ids[-1:])}" if shard.ends_marked and ids else ""
        yield f"{BOUNDARY}{shown}{end}{BOUNDARY}"


def _text(tokenizer: LoadedTokenizer | None, ids: list[int], whole: bool = False) -> str:
    """The text of some tokens; of many, of their beginning and end. Control characters are spelled out."""
    if len(ids) > 3 * SAMPLE_TOKENS and not whole:
        left_out = len(ids) - 2 * SAMPLE_TOKENS
        first, last = _text(tokenizer, ids[:SAMPLE_TOKENS]), _text(tokenizer, ids[-SAMPLE_TOKENS:])
        return f"{first} [... {left_out:,} tokens ...] {last}"
    if tokenizer is None:
        return "".join(f" {token}" for token in ids)
    from mambatrain.report.chat_text import visible

    return visible(tokenizer.decode(ids))


def row_text(row: ShownRow, tokenizer: LoadedTokenizer | None) -> Text:
    """A row as text: `┃12┃` where the state is reset and document 12 begins, `⟦...⟧` around what is not predicted.

    The first token of a span is read and not predicted either; it is left as it is.
    """
    from rich.text import Text

    shown = Text()
    for span in row.spans:
        starts = dict(zip(span.boundaries, span.documents, strict=True))
        uncounted = set(span.uncounted)
        edges = (edge for i in uncounted for edge in (i, i + 1) if (edge in uncounted) != (edge - 1 in uncounted))
        cuts = sorted({0, 1, len(span.ids), *span.boundaries, *edges})
        pending: list[int] = []  # plain ids, decoded together: a character may need several
        for first, stop in pairwise(cuts):
            if first in starts or first in uncounted:
                shown.append(_text(tokenizer, pending, whole=True))
                pending = []
            if first in starts:
                shown.append(f"{BOUNDARY}{starts[first]:,}{BOUNDARY}", style="bold reverse")
            if first in uncounted:
                shown.append(f"⟦{_text(tokenizer, span.ids[first:stop], whole=True)}⟧", style="dim")
            else:
                pending += span.ids[first:stop]
        shown.append(_text(tokenizer, pending, whole=True))
    if row.num_padding:
        shown.append(f"\n[{row.num_padding:,} positions of padding, not counted]", style="dim")
    return shown


def row_title(row: ShownRow) -> str:
    """Where a row comes from."""
    documents = sorted(row.documents)
    few = ", ".join(f"{number:,}" for number in documents[:8]) + (", ..." if len(documents) > 8 else "")
    named = f"document{'s' if len(documents) > 1 else ''} {few}"
    place = f"its slot's stream of {row.source}" if row.in_stream else f"window {row.window:,} of {row.source}"
    return f"row {row.slot}: {place}, epoch {row.epoch}, {named}"
