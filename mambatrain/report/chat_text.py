"""Conversations for people: what is trained on in colour, all else in brackets, which do without colour, too."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mambatrain.data.open_tokens import Tokens
from mambatrain.data.tokenizer import LoadedTokenizer

if TYPE_CHECKING:
    from rich.text import Text

SHOWN_TOKENS = 120  # of each end of a long turn
LEGEND = "what is read and not trained on stands in ⟦brackets⟧"


def visible(text: str) -> str:
    """Control characters but line ends and tabulators are spelled out."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)


def shown_chats(tokens: Tokens, loaded: LoadedTokenizer, count: int) -> Iterator[tuple[str, Text]]:
    """Title and text of the first training conversations of a folder."""
    shard = tokens.train
    assert shard.counted is not None, "these are conversations"
    for number in range(min(count, shard.num_documents)):
        start = int(shard.document_starts[number])
        ids = shard.document(number).tolist()
        counted = shard.counted[start : start + len(ids)]
        yield (
            f"conversation {number:,}: {int(counted.sum()):,} of {len(ids):,} tokens count",
            chat_text(ids, counted.tolist(), loaded),
        )


def chat_text(ids: list[int], counted: list[bool], loaded: LoadedTokenizer) -> Text:
    """One conversation; of turns that are very long, beginning and end."""
    from rich.text import Text

    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(np.array(counted, dtype=np.int8))) + 1).tolist(), len(ids)]
    for first, stop in pairwise(edges):
        shown = _text(ids[first:stop], loaded)
        if counted[first]:
            text.append(shown, style="bold green")
        else:
            text.append(f"⟦{shown}⟧", style="dim")
    return text


def _text(ids: list[int], loaded: LoadedTokenizer) -> str:
    if len(ids) <= 3 * SHOWN_TOKENS:
        return visible(loaded.decode(ids))
    first, last = loaded.decode(ids[:SHOWN_TOKENS]), loaded.decode(ids[-SHOWN_TOKENS:])
    return f"{visible(first)} [... {len(ids) - 2 * SHOWN_TOKENS:,} tokens ...] {visible(last)}"
