"""Rows of the known formats of conversations into messages: OpenAI's, ShareGPT, Alpaca, prompt and completion."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from mambatrain.chats.template import Message
from mambatrain.data.text_fields import BadText, json_name
from mambatrain.errors import nearest
from mambatrain.recipe.chat_section import ChatFormat, Role

_ROLES = get_args(Role)
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
}
PROMPTS, _COMPLETIONS = ("prompt", "question"), ("completion", "response", "answer")
_CONTROLS = ("weight", "train")
SIDES = ("chosen", "rejected")
_SELF_INSTRUCT = {"instruction", "instances"}


@dataclass(frozen=True)
class ReadChat:
    """A conversation as it was read.

    Attributes:
        messages: `role` and `content` of each, and what else it holds.
        counts: of each, whether it is trained on by its own word; None: by its role.
        format: what it was taken for.
    """

    messages: list[Message]
    counts: list[bool | None]
    format: ChatFormat

    def as_text(self) -> str:
        return json.dumps([self.messages, self.counts, self.format])

    @classmethod
    def from_text(cls, text: str) -> ReadChat:
        """The inverse of `as_text`."""
        return cls(*json.loads(text))


class ChatFields:
    """Takes the conversation out of rows; what `DocumentReader` wants of the fields of a text.

    Args:
        format: `auto` looks at the fields of each row.
        prompt_field, completion_field: of prompt_completion; None: by their usual names.
    """

    names: tuple[str, ...] = ()
    """All fields are looked at."""

    def __init__(
        self, format: ChatFormat | str = "auto", prompt_field: str | None = None, completion_field: str | None = None
    ) -> None:
        self.format = format
        self._prompts = PROMPTS if prompt_field is None else (prompt_field,)
        self._completions = _COMPLETIONS if completion_field is None else (completion_field,)

    def hint_for(self, missing: str, fields: list[str]) -> str:
        """What to say where a column is not there."""
        return f"its fields are: {', '.join(fields)}"

    def text_of(self, row: Mapping[str, Any]) -> str | BadText:
        """The conversation of a row, spelled so that `ReadChat.from_text` reads it."""
        try:
            format = self._format_of(row)
            refuse_tools(row)
            messages, counts = _READERS[format](self, row)
            check_order(messages)
            return ReadChat(messages, counts, format).as_text()
        except BadChatError as bad:
            return BadText(str(bad), bad.hint)

    def _format_of(self, row: Mapping[str, Any]) -> ChatFormat:
        fits: dict[ChatFormat, bool] = {
            "messages": row.get("messages") is not None,
            "sharegpt": row.get("conversations") is not None,
            "alpaca": "instruction" in row and "output" in row,
            "prompt_completion": self._first(self._prompts, row) is not None
            and self._first(self._completions, row) is not None,
        }
        if self.format != "auto":
            format: ChatFormat = self.format  # type: ignore[assignment]  # the section's type
            if not fits[format]:
                raise BadChatError(f"has not the fields of {format}, it has: {', '.join(row)}")
            return format
        found = [format for format, there in fits.items() if there]
        if len(found) > 1:
            hint = "data.chats.format names which one is meant"
            raise BadChatError(f"has the fields of several formats: {', '.join(found)}", hint)
        if not found and row.keys() >= set(SIDES):
            hint = "`mambatrain finetune dpo` learns from pairs (data.chats.format: preference)"
            raise BadChatError("is a preference pair (chosen, rejected), not a conversation", hint)
        if not found and row.keys() >= _SELF_INSTRUCT:
            raise BadChatError(
                "has `instances`, as the release of self-instruct has them: several answers to one instruction",
                "write a row of instruction, input and output for each of them",
            )
        if not found:
            raise BadChatError(
                f"has no conversation: its fields are {', '.join(row) or 'none'}",
                "known are messages; conversations; instruction and output; prompt (or question) and completion "
                "(or response, answer); data.chats.prompt_field and completion_field name others",
            )
        return found[0]

    @staticmethod
    def _first(names: tuple[str, ...], row: Mapping[str, Any]) -> str | None:
        return next((name for name in names if name in row), None)

    def _read_messages(self, row: Mapping[str, Any]) -> Turns:
        return read_turns(row["messages"], "messages", "role", "content", {role: role for role in _ROLES})

    def _read_sharegpt(self, row: Mapping[str, Any]) -> Turns:
        turns = row["conversations"]
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
            messages, counts = read_turns(turns, "conversations", "role", "content", _SHAREGPT_ROLES)
        else:
            messages, counts = read_turns(turns, "conversations", "from", "value", _SHAREGPT_ROLES)
        return behind_system(row, messages, counts)

    def _read_alpaca(self, row: Mapping[str, Any]) -> Turns:
        asked = text_in(row["instruction"], "instruction")
        if more := text_in(row.get("input") or "", "input"):
            asked += f"\n\n{more}"
        messages: list[Message] = []
        for number, turn in enumerate(row.get("history") or []):  # earlier turns, as pairs
            if not isinstance(turn, list) or len(turn) != 2:
                raise BadChatError(f"has no pair of texts in `history` {number}")
            messages += _turn(*(text_in(text, f"history {number}") for text in turn))
        messages += _turn(asked, text_in(row["output"], "output"))
        return behind_system(row, messages, [None] * len(messages))

    def _read_prompt_completion(self, row: Mapping[str, Any]) -> Turns:
        names = self._first(self._prompts, row), self._first(self._completions, row)
        (prompt_name, prompt), (completion_name, completion) = ((str(name), row[str(name)]) for name in names)
        if isinstance(prompt, list) and isinstance(completion, list):  # both in messages, as TRL has them
            known = {role: role for role in _ROLES}
            before = read_turns(prompt, prompt_name, "role", "content", known)
            after = read_turns(completion, completion_name, "role", "content", known)
            return before[0] + after[0], [False] * len(before[0]) + after[1]
        return _turn(text_in(prompt, prompt_name), text_in(completion, completion_name)), [None, None]


Turns = tuple[list[Message], list[bool | None]]
"""Messages, and whether each is trained on by its own word."""
_READERS: dict[ChatFormat, Callable[[ChatFields, Mapping[str, Any]], Turns]] = {
    "messages": ChatFields._read_messages,
    "sharegpt": ChatFields._read_sharegpt,
    "alpaca": ChatFields._read_alpaca,
    "prompt_completion": ChatFields._read_prompt_completion,
}


class BadChatError(Exception):
    """Why a row holds no conversation that can be used."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.hint = hint


def refuse_tools(row: Mapping[str, Any]) -> None:
    """A model that never saw them could only guess what to call."""
    if row.get("tools") or row.get("functions"):
        raise BadChatError("holds tools that may be called, which is not supported")


def _turn(asked: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def behind_system(row: Mapping[str, Any], messages: list[Message], counts: list[bool | None]) -> Turns:
    """Messages behind what stands in the row's `system`."""
    system = row.get("system") or ""
    if not system:
        return messages, counts
    return [{"role": "system", "content": text_in(system, "system")}, *messages], [None, *counts]


def read_turns(turns: Any, field: str, role_key: str, content_key: str, roles: Mapping[str, str]) -> Turns:
    """Messages and their own words of a list of turns."""
    turns = unpacked(turns)
    if not isinstance(turns, list) or not turns:
        raise BadChatError(f"holds {'an empty list' if turns == [] else json_name(turns)} in `{field}`, not messages")
    messages: list[Message] = []
    counts: list[bool | None] = []
    for number, turn in enumerate(turns, 1):
        place, turn = f"message {number}", unpacked(turn)
        if not isinstance(turn, dict):
            raise BadChatError(f"holds {json_name(turn)} as {place}, not an object")
        for key in ("tool_calls", "function_call"):
            if turn.get(key):
                raise BadChatError(f"holds `{key}` in {place}, which is not supported")
        if not isinstance(role := turn.get(role_key), str) or role not in roles:
            close = nearest(str(role), list(roles))
            known = f"did you mean {close}?" if close else f"known roles are {', '.join(roles)}"
            raise BadChatError(f"has {place} of the unknown role {role!r} in `{role_key}`", known)
        own = (role_key, content_key, *_CONTROLS)
        more = {key: value for key, value in turn.items() if key not in own and value is not None}
        content = text_in(_joined(turn.get(content_key)), f"{content_key} of {place}")
        messages.append({**more, "role": roles[role], "content": content})
        counts.append(_own_word(turn, place))
    return messages, counts


def unpacked(value: Any) -> Any:
    """The datasets package keeps objects that have not all the same fields as JSON in texts."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _joined(content: Any) -> Any:
    """OpenAI's other form of a content: a list of parts, all of them text."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    return content


def _own_word(turn: Mapping[str, Any], place: str) -> bool | None:
    """What a message says of itself: `train` true or false, `weight` 1 or 0."""
    said = [turn[key] for key in _CONTROLS if turn.get(key) is not None]
    if any(value not in (0, 1) for value in said) or len(set(said)) > 1:
        shown = ", ".join(f"{key} {turn[key]!r}" for key in _CONTROLS if key in turn)
        raise BadChatError(f"has {shown} in {place}; a message counts (1, true) or not (0, false)")
    return bool(said[0]) if said else None


def text_in(value: Any, name: str) -> str:
    """A field that has to be text."""
    if not isinstance(value, str):
        raise BadChatError(f"holds {json_name(value)} in `{name}`, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadChatError(f"is not UTF-8: a lone surrogate in `{name}`, character {error.start}") from None
    return value


def check_order(messages: list[Message]) -> None:
    """A system message first if at all; then user and assistant in turn, tools before the assistant reads them."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise BadChatError("has no turn of the assistant")
    before = None
    follows = {None: ("system", "user"), "system": ("user",), "user": ("assistant",)}
    follows |= {"assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    for number, role in enumerate(roles, 1):
        if role not in follows[before]:
            behind = "at its beginning" if before is None else f"behind one of {before}"
            raise BadChatError(f"has its roles out of order: message {number} is of {role}, {behind}")
        before = role
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and not message["content"].strip():
            raise BadChatError(f"has an empty completion: message {number} of the assistant holds no text")
