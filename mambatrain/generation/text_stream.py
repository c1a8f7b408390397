"""Tokens as they come into text as soon as it is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNSETTLED = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no character, or not one yet


class TextStream:
    """Never shows half a character.

    A token may end inside a UTF-8 character, which then decodes to U+FFFD: such an end is held back until what follows
    settles it. The pieces joined, and the rest, are the decoding of all tokens.

    Args:
        tokenizer: the one that made the tokens.
        before: the ids before the first: some tokenizers spell a word's space by what precedes it.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # What was shown last and what has come since; only this much is decoded again with each token.
        self._seen, self._num_shown_ids = list(before), len(before)
        self._text = tokenizer.decode(self._seen)
        self._num_shown = len(self._text)

    def add(self, token: int) -> str:
        """The text that is known now and was not before; often none, where a character is not complete."""
        self._seen.append(token)
        self._text = self._tokenizer.decode(self._seen)
        settled = self._text.rstrip(UNSETTLED)
        piece = settled[self._num_shown :]
        self._num_shown += len(piece)
        if self._text == settled and (latest := self._tokenizer.decode(self._seen[self._num_shown_ids :])):
            self._seen = self._seen[self._num_shown_ids :]
            self._text, self._num_shown, self._num_shown_ids = latest, len(latest), len(self._seen)
        return piece

    @property
    def is_whole(self) -> bool:
        """Whether all that came was shown."""
        return len(self._text) == self._num_shown

    def rest(self) -> str:
        """What was held back, when nothing more will come."""
        return self._text[self._num_shown :]


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer, before: Sequence[int] = ()) -> Iterator[str]:
    """The pieces of text of some tokens, none of them empty; see TextStream."""
    stream = TextStream(tokenizer, before)
    for token in tokens:
        if piece := stream.add(token):
            yield piece
    if rest := stream.rest():
        yield rest
