"""Conversations of files into tokens that fit a row: one by one, or the two of a preference pair together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from mambatrain.chats.counted import Spans, counting_messages, render_counted
from mambatrain.chats.encode import ChatEncoder, EncodedChat
from mambatrain.chats.formats import ChatFields, ReadChat
from mambatrain.chats.pairs import PairFields, ReadPair
from mambatrain.chats.template import ChatTemplate
from mambatrain.data.documents import Document, DocumentReader
from mambatrain.data.progress import ByteProgress
from mambatrain.data.sources import SourceFile
from mambatrain.data.text_fields import BadText
from mambatrain.data.tokenizer import LoadedTokenizer
from mambatrain.errors import UserError
from mambatrain.recipe.chat_section import PAIRS, ChatSection

_AT_ONCE = 256  # conversations or pairs that are encoded together

Together = list[EncodedChat]
"""What a row shows whole or not at all: a conversation, or the chosen and the rejected one of a pair."""


@dataclass
class Outcome:
    """What became of the conversations; of pairs, where there are such."""

    formats: Counter[str] = field(default_factory=Counter)
    num_truncated: int = 0
    num_counted_cut: int = 0
    num_too_long: int = 0
    first_too_long: str | None = None


def fields_of(section: ChatSection) -> ChatFields | PairFields:
    """What takes the conversation, or the pair, out of a row."""
    if section.format == PAIRS:
        return PairFields(section.prompt_field)
    return ChatFields(section.format, section.prompt_field, section.completion_field)


def read_chats(
    reader: DocumentReader,
    files: tuple[SourceFile, ...],
    section: ChatSection,
    loaded: LoadedTokenizer,
    template: ChatTemplate,
    row_tokens: int,
    outcome: Outcome,
) -> list[Together]:
    """All that can be used, in the order of the files.

    Raises:
        UserError: something cannot be used and is not to be left out, by file and line.
    """
    encoder = ChatEncoder(loaded)
    kept: list[Together] = []
    with ByteProgress("reading conversations", sum(file.num_bytes for file in files)) as progress:
        rendered = _rendered(reader, section, template, encoder, outcome)
        while batch := list(islice(rendered, _AT_ONCE)):
            flat = [one for _, ones in batch for one in ones]
            # One token more than a row has positions: its last target.
            encoded = iter(_encode(encoder, flat, row_tokens + 1))
            for origin, ones in batch:
                together = list(islice(encoded, len(ones)))
                if sum(map(_num_positions, together)) > row_tokens:
                    if not _may_be_cut(together, origin, section, row_tokens, outcome):
                        continue
                    if len(together) == 2:
                        together = _encode(encoder, ones, _common_limit(together, row_tokens))
                if (bad := _why_bad(together, row_tokens)) is not None:
                    reader.leave_out(origin, bad)
                    continue
                kept.append(together)
                num_cut = sum(chat.num_cut[0] > 0 for chat in together)
                outcome.num_truncated += num_cut > 0
                outcome.num_counted_cut += sum(chat.num_cut[1] for chat in together)
            progress.advance_to(reader.bytes_read)
    return kept


def _encode(encoder: ChatEncoder, ones: Sequence[tuple[str, Spans]], max_tokens: int) -> Together:
    return encoder.encode([text for text, _ in ones], [spans for _, spans in ones], max_tokens)


def _num_positions(chat: EncodedChat) -> int:
    """What a conversation fills of a row, uncut: each token but the last is read."""
    return len(chat.ids) + chat.num_cut[0] - 1


def _common_limit(together: Together, row_tokens: int) -> int:
    """Tokens that each of a pair may keep so that both fit: the shorter stays whole where it fills less than half."""
    return max(row_tokens - min(map(_num_positions, together)), row_tokens // 2) + 1


def _why_bad(together: Together, row_tokens: int) -> BadText | None:
    """Why there is nothing to learn from them."""
    was_cut = any(chat.num_cut[0] for chat in together)
    if not all(chat.counted.any() for chat in together):
        if was_cut:
            longest = max(len(chat.ids) for chat in together)
            reason = f"has no counted token among its first {longest:,}, all that a row shows"
            return BadText(reason, "longer rows (data.row_tokens) show more")
        return BadText("has no token that counts", "data.chats.count names other roles")
    if len(together) == 2 and np.array_equal(together[0].ids, together[1].ids):
        if was_cut:
            return BadText(
                f"has answers that differ behind what a row of {row_tokens:,} shows of them alone",
                "longer rows (data.row_tokens) show more",
            )
        return BadText("has equal answers in the template: chosen and rejected are the same tokens")
    return None


def _may_be_cut(together: Together, origin: str, section: ChatSection, row_tokens: int, outcome: Outcome) -> bool:
    """Whether what does not fit a row is kept without its end."""
    if section.too_long == "refuse":
        needed = sum(map(_num_positions, together))
        shown = f"{needed + 1:,} tokens, and a row shows {row_tokens + 1:,}"
        if len(together) == 2:
            shown = f"two answers that fill {needed:,} positions with their prompt, and a row has {row_tokens:,}"
        raise UserError(
            f"{origin} has {shown}", "longer rows (data.row_tokens), or data.chats.too_long: truncate or skip"
        )
    outcome.first_too_long = outcome.first_too_long or origin
    if section.too_long == "skip":
        outcome.num_too_long += 1
        return False
    return True


def _rendered(
    reader: DocumentReader,
    section: ChatSection,
    template: ChatTemplate,
    encoder: ChatEncoder,
    outcome: Outcome,
) -> Iterator[tuple[str, list[tuple[str, Spans]]]]:
    """Origin, and text and counted characters, of each conversation or of the two of each pair."""
    for document in reader:
        chats = _chats_of(document, section)
        counting = [counting_messages(chat, section) for chat in chats]
        if not all(counting):
            reader.leave_out(document.origin, BadText("has no message that counts", "data.chats.count names roles"))
            continue
        try:
            texts = [
                render_counted(template, chat.messages, numbers, encoder.special_texts)
                for chat, numbers in zip(chats, counting, strict=True)
            ]
        except UserError as error:
            reader.leave_out(document.origin, BadText(f"cannot be shown: {error.message}", error.hint))
            continue
        outcome.formats[chats[0].format] += 1
        yield document.origin, texts


def _chats_of(document: Document, section: ChatSection) -> list[ReadChat]:
    if section.format == PAIRS:
        pair = ReadPair.from_text(document.text)
        return [pair.chosen, pair.rejected]
    return [ReadChat.from_text(document.text)]
