"""Which characters count: marked by the template, or found; by role, by a message's own word, by turn."""

from __future__ import annotations

from typing import Any

import pytest

from mambatrain.chats.counted import counting_messages, render_counted
from mambatrain.chats.formats import ReadChat
from mambatrain.chats.template import ChatTemplate, Message
from mambatrain.chats.template_files import CHATML, PLAIN, RAW
from mambatrain.errors import UserError
from mambatrain.recipe import ChatSection

END = "<|endoftext|>"
SPECIAL = [END, "<|im_start|>", "<|im_end|>", "<|im"]
MESSAGES: list[Message] = [
    {"role": "system", "content": "assistant"},
    {"role": "user", "content": "assistant\nuser"},
    {"role": "assistant", "content": "user"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "a\n\nb"},
    {"role": "user", "content": "nobody answers"},
]


def without_marks(source: str) -> str:
    for mark in ("{%- generation %}", "{% generation %}", "{% endgeneration %}"):
        source = source.replace(mark, "")
    return source


def counted_texts(source: str, counting: list[int], messages: list[Message] = MESSAGES) -> list[str]:
    text, spans = render_counted(ChatTemplate(source, "a test", END, END), messages, counting, SPECIAL)
    assert text == ChatTemplate(source, "a test", END, END).render(messages)
    assert spans == sorted(spans)
    return [text[start:stop] for start, stop in spans]


@pytest.mark.parametrize("change", [str, without_marks], ids=["marked", "found"])
@pytest.mark.parametrize(("source", "end"), [(CHATML, "<|im_end|>"), (PLAIN, END), (RAW, END)])
def test_an_answer_counts_with_what_ends_it(source: str, end: str, change: Any) -> None:
    source = change(source)
    assert ChatTemplate(source, "", END, END).marks_generation == (change is str)
    assert counted_texts(source, [2, 4]) == [f"user{end}", f"a\n\nb{end}"]
    assert counted_texts(source, [4]) == [f"a\n\nb{end}"]


def test_other_roles_count_when_asked_for() -> None:
    assert counted_texts(CHATML, [0, 1, 4]) == ["assistant<|im_end|>", "assistant\nuser<|im_end|>", "a\n\nb<|im_end|>"]
    assert counted_texts(without_marks(CHATML), [1, 2]) == ["assistant\nuser<|im_end|>", "user<|im_end|>"]
    assert counted_texts(without_marks(PLAIN), [3]) == ["b\n\n"]  # no token ends it, so all that stands behind


def test_a_turn_may_end_in_text() -> None:
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} [/{{ m.role }}]\n{% endfor %}"
    source += "{% if add_generation_prompt %}[assistant] {% endif %}"
    chat: list[Message] = [{"role": "user", "content": " a "}, {"role": "assistant", "content": " b\n"}]
    assert counted_texts(source, [1], chat) == ["b [/assistant]"]
    assert counted_texts(source, [1], [*chat, *chat]) == ["b [/assistant]"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (without_marks(RAW).replace(" + eos_token", ""), "puts nothing behind message 2 that ends the turn"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not show message 2 as it is"),
        ("{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}", "does not show message 2"),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}",
            "than asked for (message 2)",
        ),
        ("{% if 1 %}\n{{ messages[7].content.x }}\n{% endif %}", "failed in line 2"),
        (
            "{% for m in messages %}{% generation %}{{ raise_exception('no') }}{% endgeneration %}{% endfor %}",
            "line 1: no",
        ),
    ],
)
def test_a_template_that_does_not_tell_is_refused(source: str, problem: str) -> None:
    with pytest.raises(UserError) as told:
        counted_texts(source, [1], MESSAGES[1:3])
    assert problem in told.value.message


def test_marks_that_do_not_fit_the_turns_are_refused_where_turns_are_chosen() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert counted_texts(source, [1, 3], MESSAGES[1:5]) == ["assistant\nuser", "user", "b", "a\n\nb"]
    with pytest.raises(UserError, match="marks 4 spans as generated where the assistant has 2 turns"):
        counted_texts(source, [3], MESSAGES[1:5])
    calculated = "{% set x %}{% generation %}ab{% endgeneration %}{% endset %}{{ x | length }}"
    with pytest.raises(UserError, match="do not hold text"):
        counted_texts(calculated, [1], MESSAGES[1:3])


def test_roles_own_words_and_turns_decide_what_counts() -> None:
    chat = ReadChat(MESSAGES, [None, None, None, True, False, None], "messages")

    def counting(**settings: Any) -> list[int]:
        return counting_messages(chat, ChatSection(files=["x"], **settings))

    assert counting() == [2, 3]
    assert counting(turns="last") == [3]
    assert counting(count=["assistant", "system"]) == [0, 2, 3]
    assert counting(count=["user"]) == [1, 3, 5]
