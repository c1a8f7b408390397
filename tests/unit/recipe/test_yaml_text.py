"""YAML 1.2's scalars, errors that name the line, and text that survives the way to disk and back."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mambatrain.recipe.yaml_text import format_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("4.", 4.0),
        (".5", 0.5),
        ("-1.5e+3", -1500.0),
        ("1_200_000", 1_200_000),
        ("010", 10),  # octal in YAML 1.1
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("No", "No"),
        ("yes", "yes"),
        ("0x10", "0x10"),
        ("12:30", "12:30"),  # 750 in YAML 1.1
        ("2026-01-02", "2026-01-02"),  # a date in YAML 1.1
        (".inf", ".inf"),
        ("'3e-4'", "3e-4"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model:\n  d_model: 1\n  d_model: 2\n", r"^line 3, column 3: key 'd_model' appears twice$"),
        ("1: x\n", r"^line 1, column 1: key 1 is not text$"),
        ("? [a]\n: x\n", r"^line 1, column 3: key \['a'\] is not text$"),
        ("a: [1\nb: 2\n", r"^line 2, column \d+: while parsing a flow sequence, expected"),
        ("a: b: c\n", r"^line 1, column 5: mapping values are not allowed here$"),
        ("a: !!int many\n", "invalid literal for int"),
        ("a: !!python/object:os.system x\n", r"^line 1, column 4: could not determine a constructor"),
        ("a: \x00\n", "special characters are not allowed"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_comes_back_as_it_was(text: str) -> None:
    assert parse_yaml(format_yaml({"about": text})) == {"about": text}


@pytest.mark.parametrize("text", ["on", "no", "3e-4", "1_0", "1:30", "0o7", "null", "~", "true", "", " x", "a: b", "#"])
def test_text_that_either_version_takes_for_something_else_is_quoted(text: str) -> None:
    written = format_yaml({"about": text})
    assert parse_yaml(written) == yaml.safe_load(written) == {"about": text}


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.none())
def test_values_come_back_as_they_were(value: Any) -> None:
    parsed = parse_yaml(format_yaml({"value": value}))["value"]
    assert parsed == value
    assert type(parsed) is type(value)
