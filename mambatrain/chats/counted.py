"""Which characters of a rendered conversation are trained on: what a model says, and what ends its turn."""

from __future__ import annotations

from collections.abc import Sequence

from mambatrain.chats.formats import ReadChat
from mambatrain.chats.template import ChatTemplate, Message
from mambatrain.errors import UserError
from mambatrain.recipe.chat_section import ChatSection

# Stands for a message's text while its place is looked for; private characters, so that no text holds it.
_STAND_IN = "\U000f8a03text\U000f8a04"

Spans = list[tuple[int, int]]


def counting_messages(chat: ReadChat, section: ChatSection) -> list[int]:
    """Which messages are trained on, ascending: by their own word, else by their role; all, or the last of them."""
    numbers = [
        number
        for number, (message, own_word) in enumerate(zip(chat.messages, chat.counts, strict=True))
        if (message["role"] in section.count if own_word is None else own_word)
    ]
    return numbers[-1:] if section.turns == "last" else numbers


def render_counted(
    template: ChatTemplate, messages: Sequence[Message], counting: Sequence[int], special: Sequence[str]
) -> tuple[str, Spans]:
    """The text of a conversation, and the spans of characters that count: ascending, none empty.

    Where the template marks what is generated, that is what counts of the assistant's turns. Else, and for other roles,
    a turn counts from the first character of its text to the end of what ends it: a special token, or the text up to
    the next white space at its end.

    Args:
        template: of the conversation.
        messages: all of them.
        counting: which of them count, ascending.
        special: texts of the tokenizer's special tokens.

    Raises:
        UserError: the template fails, or does not put the texts where a turn's beginning and end can be told.
    """
    if not template.marks_generation:
        text = template.render(messages)
        return text, [_span_of(template, messages, number, text, special) for number in counting]
    text, generated = template.render_marked(messages)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not set(answers) <= set(counting):
        if len(generated) != len(answers):
            raise UserError(
                f"the chat template {template.name} marks {len(generated)} spans as generated where the assistant has "
                f"{len(answers)} turns, of which not all are to count",
                "mend its {% generation %} marks: one span for each turn",
            )
        generated = [span for number, span in zip(answers, generated, strict=True) if number in counting]
    others = [number for number in counting if messages[number]["role"] != "assistant"]
    spans = [_span_of(template, messages, number, text, special) for number in others]
    return text, sorted(span for span in (*generated, *spans) if span[0] < span[1])


def _span_of(
    template: ChatTemplate, messages: Sequence[Message], number: int, text: str, special: Sequence[str]
) -> tuple[int, int]:
    """From the first character of a message to the end of its turn."""
    message = messages[number]
    place = f"message {number + 1}"
    probe = template.render([*messages[:number], {**message, "content": _STAND_IN}, *messages[number + 1 :]])
    before, stand_in, after = probe.partition(_STAND_IN)
    content: str = message["content"]
    shown = next((one for one in (content, content.strip()) if before + one + after == text), None)
    if not stand_in or shown is None:
        raise UserError(
            f"the chat template {template.name} does not show {place} as it is, so where it begins cannot be told",
            "mark what is trained on with {% generation %} in the template",
        )
    if message["role"] == "assistant" and template.render(messages[:number], add_generation_prompt=True) != before:
        raise UserError(
            f"the chat template {template.name} puts an answer elsewhere than asked for ({place})",
            "mark what is trained on with {% generation %} in the template",
        )
    stop = len(before) + len(shown)
    ending = max((len(token) for token in special if token and after.startswith(token)), default=0)
    if not ending:
        upto = template.render([*messages[:number], {**message, "content": _STAND_IN}])
        alone = upto.partition(_STAND_IN)[2]
        ending = len(alone.rstrip()) or len(alone)
        if not ending or not after.startswith(alone[:ending]):
            raise UserError(
                f"the chat template {template.name} puts nothing behind {place} that ends the turn",
                "put a token or a text behind each turn: without, a model cannot learn to stop",
            )
    return len(before), stop + ending
