"""Every format becomes the same messages, and what is wrong with a row is said."""

from __future__ import annotations

from typing import Any

import pytest

from mambatrain.chats.formats import ChatFields, ReadChat
from mambatrain.data.text_fields import BadText

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SYSTEM = {"role": "system", "content": "be kind"}


def read(row: dict[str, Any], **how: Any) -> ReadChat:
    text = ChatFields(**how).text_of(row)
    assert isinstance(text, str), text
    return ReadChat.from_text(text)


def problem(row: dict[str, Any], **how: Any) -> BadText:
    bad = ChatFields(**how).text_of(row)
    assert isinstance(bad, BadText)
    return bad


@pytest.mark.parametrize(
    ("row", "format", "messages"),
    [
        ({"messages": [SYSTEM, *HELLO], "id": 7}, "messages", [SYSTEM, *HELLO]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}], "name": None}, HELLO[1]]},
         "messages", HELLO),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": "be kind"},
         "sharegpt", [SYSTEM, *HELLO]),
        ({"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
         "sharegpt", HELLO),
        ({"instruction": "hi", "input": "", "output": "hello"}, "alpaca", HELLO),
        ({"instruction": "hi", "output": "hello", "history": [["a", "b"]], "system": "be kind"}, "alpaca",
         [SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *HELLO]),
        ({"instruction": "add", "input": "1 2", "output": "3"}, "alpaca",
         [{"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}]),
        ({"prompt": "hi", "completion": "hello"}, "prompt_completion", HELLO),
        ({"prompt": "hi", "response": "hello"}, "prompt_completion", HELLO),
        ({"question": "hi", "answer": "hello"}, "prompt_completion", HELLO),
        ({"prompt": [SYSTEM, HELLO[0]], "completion": HELLO[1:]}, "prompt_completion", [SYSTEM, *HELLO]),
    ],
)  # fmt: skip
def test_a_row_is_known_by_its_fields(row: dict[str, Any], format: str, messages: list[dict[str, str]]) -> None:
    chat = read(row)
    assert (chat.format, chat.messages) == (format, messages)
    assert read(row, format=format) == chat


def test_named_fields_and_formats_go_before_what_is_found() -> None:
    both = {"messages": HELLO, "prompt": "a", "completion": "b"}
    assert "several formats: messages, prompt_completion" in problem(both).reason
    assert read(both, format="prompt_completion").messages[0]["content"] == "a"
    assert read({"q": "hi", "a": "hello"}, prompt_field="q", completion_field="a").messages == HELLO
    assert "has not the fields of alpaca, it has: messages" in problem({"messages": HELLO}, format="alpaca").reason


def test_a_messages_own_word_is_kept_apart_from_what_the_template_sees() -> None:
    turns = [{**HELLO[0], "train": True}, {**HELLO[1], "weight": 0}, HELLO[0], {**HELLO[1], "weight": 1.0}]
    chat = read({"messages": turns})
    assert chat.counts == [True, False, None, True]
    assert chat.messages == [*HELLO, *HELLO]
    assert read({"prompt": HELLO, "completion": HELLO}).counts == [False, False, None, None]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "hi"}, "has no conversation: its fields are text"),
        ({}, "its fields are none"),
        ({"chosen": "a", "rejected": "b", "prompt": "c"}, "is a preference pair"),
        ({"instruction": "a", "instances": [{"input": "", "output": "b"}]}, "has `instances`, as the release of self-"),
        ({"messages": []}, "holds an empty list in `messages`"),
        ({"messages": "hi"}, "holds text in `messages`"),
        ({"messages": ["hi"]}, "holds text as message 1, not an object"),
        ({"messages": HELLO[:1]}, "has no turn of the assistant"),
        ({"messages": [HELLO[1], HELLO[0]]}, "roles out of order: message 1 is of assistant, at its beginning"),
        ({"messages": [HELLO[0], *HELLO]}, "roles out of order: message 2 is of user, behind one of user"),
        ({"messages": [*HELLO, SYSTEM]}, "message 3 is of system, behind one of assistant"),
        ({"messages": [*HELLO, HELLO[1]]}, "message 3 is of assistant, behind one of assistant"),
        ({"messages": [{"role": "usr", "content": "hi"}]}, "message 1 of the unknown role 'usr' in `role`"),
        ({"messages": [{"role": "user"}]}, "holds null in `content of message 1`, not text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "is not UTF-8: a lone surrogate"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "holds a list in `content of",
        ),
        ({"messages": HELLO, "tools": [{"name": "look_up"}]}, "holds tools that may be called"),
        ({"messages": [HELLO[0], {"role": "assistant", "tool_calls": [{}]}]}, "holds `tool_calls` in message 2"),
        ({"messages": [{**HELLO[0], "weight": 0.5}]}, "has weight 0.5 in message 1; a message counts (1, true) or not"),
        ({"messages": [{**HELLO[0], "weight": 1, "train": False}]}, "has weight 1, train False in message 1"),
        ({"messages": [{**HELLO[0], "train": [1]}]}, "has train [1] in message 1"),
        ({"prompt": "hi", "completion": " \n"}, "has an empty completion: message 2 of the assistant"),
        ({"instruction": "hi", "output": None}, "holds null in `output`, not text"),
        ({"instruction": "hi", "output": "x", "history": [["a"]]}, "has no pair of texts in `history` 0"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown role 'robot' in `from`"),
    ],
)
def test_what_is_wrong_with_a_row(row: dict[str, Any], reason: str) -> None:
    assert reason in problem(row).reason


def test_a_misspelled_role_has_a_hint() -> None:
    assert problem({"messages": [{"role": "assistent", "content": "x"}]}).hint == "did you mean assistant?"
