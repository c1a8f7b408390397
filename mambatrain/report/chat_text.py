"""Conversations for people: what is trained on in colour, all else in brackets, which do without colour, too."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mambatrain.data.open_tokens import Tokens
from mambatrain.data.token_shards import TokenShard
from mambatrain.data.tokenizer import LoadedTokenizer

if TYPE_CHECKING:
    from rich.text import Text

SHOWN_TOKENS = 120  # of each end of a long turn
LEGEND = "what is read and not trained on stands in ⟦brackets⟧"


def visible(text: str) -> str:
    """Control characters but line ends and tabulators are spelled out."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)


def shown_chats(tokens: Tokens, loaded: LoadedTokenizer, count: int) -> Iterator[tuple[str, Text]]:
    """Title and text of the first training conversations, or preference pairs, of a folder."""
    shard = tokens.train
    assert shard.counted is not None, "these are conversations"
    if tokens.holds_pairs:
        yield from (_shown_pair(shard, number, loaded) for number in range(min(count, shard.num_documents // 2)))
        return
    for number in range(min(count, shard.num_documents)):
        ids, counted = chat_tokens(shard, number)
        yield (
            f"conversation {number:,}: {sum(counted):,} of {len(ids):,} tokens count",
            chat_text(ids, counted, loaded),
        )


def chat_tokens(shard: TokenShard, number: int) -> tuple[list[int], list[bool]]:
    """A conversation's token ids, and which of them count."""
    assert shard.counted is not None, "these are conversations"
    ids, start = shard.document(number).tolist(), int(shard.document_starts[number])
    return ids, shard.counted[start : start + len(ids)].tolist()


def _shown_pair(shard: TokenShard, number: int, loaded: LoadedTokenizer) -> tuple[str, Text]:
    """The prompt once, then the two answers."""
    chosen, rejected = (chat_tokens(shard, 2 * number + side) for side in (0, 1))
    num_prompt = min(chosen[1].index(True), rejected[1].index(True))
    text = chat_text(chosen[0][:num_prompt], chosen[1][:num_prompt], loaded)
    for label, (ids, counted), style in (("chosen", chosen, "bold green"), ("rejected", rejected, "bold red")):
        text.append(f"\n{label}:\n", style="bold")
        text.append_text(chat_text(ids[num_prompt:], counted[num_prompt:], loaded, style))
    title = f"pair {number:,}: {sum(chosen[1]):,} tokens count of the chosen answer, {sum(rejected[1]):,} of the other"
    return title, text


def chat_text(ids: list[int], counted: list[bool], loaded: LoadedTokenizer, style: str = "bold green") -> Text:
    """One conversation; of turns that are very long, beginning and end."""
    from rich.text import Text

    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(np.array(counted, dtype=np.int8))) + 1).tolist(), len(ids)]
    for first, stop in pairwise(edges):
        shown = _text(ids[first:stop], loaded)
        if counted[first]:
            text.append(shown, style=style)
        else:
            text.append(f"⟦{shown}⟧", style="dim")
    return text


def _text(ids: list[int], loaded: LoadedTokenizer) -> str:
    if len(ids) <= 3 * SHOWN_TOKENS:
        return visible(loaded.decode(ids))
    first, last = loaded.decode(ids[:SHOWN_TOKENS]), loaded.decode(ids[-SHOWN_TOKENS:])
    return f"{visible(first)} [... {len(ids) - 2 * SHOWN_TOKENS:,} tokens ...] {visible(last)}"
