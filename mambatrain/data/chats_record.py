"""What stands in the manifest of a folder of conversations."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt

from mambatrain.recipe.chat_section import ChatSection
from mambatrain.recipe.section import PositiveInt, Section


class ChatsRecord(Section):
    """How conversations were made into tokens, and what became of them; beside `sources` and `tokenizer`."""

    options: ChatSection
    """Of the recipe."""
    row_tokens: PositiveInt
    """What a conversation had to fit into."""
    template: str
    """Where it came from."""
    template_sha256: str
    formats: dict[str, NonNegativeInt]
    """What the conversations were taken for."""
    num_counted: dict[str, NonNegativeInt]
    """Tokens that count, of each split."""
    num_truncated: NonNegativeInt = 0
    """Conversations that lost their end."""
    num_counted_cut: NonNegativeInt = 0
    """Tokens that would have counted and lay in such ends."""
    num_too_long: NonNegativeInt = 0
    """Conversations that were left out for their length."""
    first_too_long: str | None = None
    """File and line of the first conversation that was longer than a row."""
    bad: list[str] = Field(default_factory=list)
    """The first of those that could not be used."""
