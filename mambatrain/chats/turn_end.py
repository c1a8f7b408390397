"""What ends an answer, found by how a template ends one."""

from __future__ import annotations

from tokenizers import Tokenizer

from mambatrain.chats.template import ChatTemplate, Message

PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
)


def find_turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int | None, str]:
    """The special token that a template puts behind an answer, or the text that it puts there; "": nothing.

    Args:
        template: whose answers end.
        tokenizer: one that takes names of special tokens for them.

    Raises:
        UserError: the template does not show an answer where it was asked for.
    """
    tail = template.tail(PROBE[:2])
    first: list[int] = tokenizer.encode(tail, add_special_tokens=False).ids[:1]
    if first and first[0] in tokenizer.get_added_tokens_decoder():
        return first[0], ""
    return None, tail.strip()
