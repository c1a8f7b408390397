from __future__ import annotations

from typing import Any

import pytest

from mambatrain.data.text_fields import BETWEEN_TEXTS, BadText, TextFields
from mambatrain.errors import UserError


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{title}\\n\\n{body}", "T\n\nB"),
        ("{title}\t{title}", "T\tT"),
        ("# {title} {{x}} \\\\n\\q", "# T {x} \\n\\q"),
        ("{body}", "B"),
    ],
)
def test_a_template_joins_fields(template: str, wanted: str) -> None:
    assert TextFields(template=template).text_of({"title": "T", "body": "B", "id": 3}) == wanted


def test_the_fields_of_a_template_are_known_once_each() -> None:
    assert TextFields(template="{b}{a}{b}").names == ("b", "a")
    assert TextFields("body").names == ("body",)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("no field", "names no field"),
        ("{", "Single '{'"),
        ("{a", "expected '}'"),
        ("{}", "just a name"),
        ("{a!r}", "just a name"),
        ("{a:>9}", "just a name"),
    ],
)
def test_what_is_no_template_is_refused(template: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        TextFields(template=template)
    assert repr(template) in caught.value.message


@pytest.mark.parametrize(
    ("row", "reason", "hint"),
    [
        ({"title": "T", "bodi": "x"}, "has no field `body`", "did you mean {bodi}?"),
        ({"title": "T", "n": "x"}, "has no field `body`", "--template may name: title, n"),
        ({"title": 3, "body": "x"}, "holds a number in `title`, not text", None),
        ({"title": "T", "body": None}, "holds null in `body`, not text", None),
        ({"title": "T", "body": ["x"]}, "holds a list in `body`, not text", None),
        ({"title": "T", "body": {}}, "holds an object in `body`, not text", None),
        ({"title": "T", "body": True}, "holds a truth value in `body`, not text", None),
        ({"title": "T", "body": "\ud800"}, "is not UTF-8: a lone surrogate at character 0", None),
    ],
)
def test_a_row_that_lacks_a_field_tells_why(row: dict[str, Any], reason: str, hint: str | None) -> None:
    assert TextFields(template="{title}{body}").text_of(row) == BadText(reason, hint)


def test_everything_takes_every_text_however_deep() -> None:
    row = {"q": "one", "n": 3, "choices": {"text": ["two", "three"], "label": [1]}, "none": None}
    assert TextFields.everything().text_of(row) == BETWEEN_TEXTS.join(["one", "two", "three"])
