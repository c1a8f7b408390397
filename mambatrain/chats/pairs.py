"""Preference pairs: two answers to one prompt, as the conversation that was chosen and the one that was rejected.

The answers are texts, or lists of messages behind `prompt`, or lists that hold the whole conversation: then what both
begin with is the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from mambatrain.chats.formats import (
    PROMPTS,
    SIDES,
    BadChatError,
    ReadChat,
    Turns,
    behind_system,
    check_order,
    read_turns,
    refuse_tools,
    text_in,
    unpacked,
)
from mambatrain.data.text_fields import BadText
from mambatrain.recipe.chat_section import PAIRS, Role

_KNOWN_ROLES = {role: role for role in get_args(Role)}


@dataclass(frozen=True)
class ReadPair:
    """Two conversations that differ in what answers the prompt; nothing of the prompt counts."""

    chosen: ReadChat
    rejected: ReadChat

    def as_text(self) -> str:
        return json.dumps([self.chosen.as_text(), self.rejected.as_text()])

    @classmethod
    def from_text(cls, text: str) -> ReadPair:
        """The inverse of `as_text`."""
        return cls(*map(ReadChat.from_text, json.loads(text)))


class PairFields:
    """Takes the pair out of rows; the face of `ChatFields`.

    Args:
        prompt_field: None: by its usual names.
    """

    names: tuple[str, ...] = ()
    """All fields are looked at."""

    def __init__(self, prompt_field: str | None = None) -> None:
        self.format = PAIRS
        self._prompts = PROMPTS if prompt_field is None else (prompt_field,)

    def hint_for(self, missing: str, fields: list[str]) -> str:
        """What to say where a column is not there."""
        return f"its fields are: {', '.join(fields)}"

    def text_of(self, row: Mapping[str, Any]) -> str | BadText:
        """The pair of a row, spelled so that `ReadPair.from_text` reads it."""
        try:
            refuse_tools(row)
            return self._read(row).as_text()
        except BadChatError as bad:
            return BadText(str(bad), bad.hint)

    def _read(self, row: Mapping[str, Any]) -> ReadPair:
        for side in SIDES:
            if row.get(side) is None:
                known = "a pair has chosen and rejected, and prompt (or question; data.chats.prompt_field)"
                raise BadChatError(f"has no `{side}`, its fields are {', '.join(row) or 'none'}", known)
        chosen, rejected = (_read_side(row[side], side) for side in SIDES)
        name = next((name for name in self._prompts if row.get(name) is not None), None)
        prompt = None if name is None else _read_prompt(row, name)
        if all(messages[0]["role"] == "assistant" for messages, _ in (chosen, rejected)):
            if prompt is None:
                hint = "its answers need one: a text, or a list of messages; data.chats.prompt_field names its field"
                raise BadChatError(f"has no {' or '.join(self._prompts)}, only answers", hint)
        else:
            begins, chosen, rejected = _divide(prompt, chosen, rejected)
            prompt = behind_system(row, *begins) if prompt is None else begins
        if _spoken(chosen) == _spoken(rejected):
            raise BadChatError("has equal answers: chosen and rejected are the same")
        chats = []
        for side, (messages, counts) in zip(SIDES, (chosen, rejected), strict=True):
            whole = [*prompt[0], *messages]
            try:
                check_order(whole)
            except BadChatError as bad:
                raise BadChatError(f"{bad} (prompt and `{side}`)") from None
            chats.append(ReadChat(whole, [*[False] * len(prompt[0]), *counts], PAIRS))
        return ReadPair(*chats)


def _read_side(value: Any, side: str) -> Turns:
    if isinstance(value, str):
        packed = unpacked(value)
        if not (isinstance(packed, list) and packed and isinstance(unpacked(packed[0]), dict)):
            return [{"role": "assistant", "content": text_in(value, side)}], [None]
    turns = read_turns(value, side, "role", "content", _KNOWN_ROLES)
    if all(message["role"] != "assistant" for message in turns[0]):
        raise BadChatError(f"has no turn of the assistant in `{side}`")
    return turns


def _read_prompt(row: Mapping[str, Any], name: str) -> Turns:
    prompt = row[name]
    if isinstance(prompt, str):
        return behind_system(row, [{"role": "user", "content": text_in(prompt, name)}], [None])
    return behind_system(row, *read_turns(prompt, name, "role", "content", _KNOWN_ROLES))


def _divide(prompt: Turns | None, chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Prompt and answers of two whole conversations, which `prompt`, where there is one, has to begin."""
    both = list(zip(_spoken(chosen), _spoken(rejected), strict=False))
    num_same = next((number for number, (one, other) in enumerate(both) if one != other), len(both))
    rests = [(messages[num_same:], counts[num_same:]) for messages, counts in (chosen, rejected)]
    if not any(messages for messages, _ in rests):
        raise BadChatError("has equal answers: chosen and rejected are the same")
    for side, (messages, _) in zip(SIDES, rests, strict=True):
        if not messages:
            raise BadChatError(f"has no answer in `{side}`: it ends where both are still the same")
        if messages[0]["role"] != "assistant":
            raise BadChatError(
                f"has other prompts in chosen and rejected: message {num_same + 1} differs and is of "
                f"{messages[0]['role']} in `{side}`"
            )
    same = chosen[0][:num_same], chosen[1][:num_same]
    if prompt is not None and _spoken(prompt) != _spoken(same)[: len(prompt[0])]:
        raise BadChatError("has a prompt that is not what chosen and rejected begin with")
    return same, rests[0], rests[1]


def _spoken(turns: Turns) -> list[tuple[str, str]]:
    """Who says what; templates do without white space around a text."""
    return [(message["role"], message["content"].strip()) for message in turns[0]]
