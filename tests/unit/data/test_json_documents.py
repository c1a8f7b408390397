from __future__ import annotations

import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambatrain.data import json_documents as module
from mambatrain.data.json_documents import read_json_lines, read_json_values
from mambatrain.data.text_fields import BadText, TextFields
from mambatrain.errors import UserError

ROWS = st.lists(
    st.fixed_dictionaries({"text": st.text(st.characters(exclude_categories=["Cs"])), "n": st.integers()}), max_size=8
)


def values(content: bytes, skip: int = 0) -> list[tuple[int, int, Any]]:
    return list(read_json_values(io.BytesIO(content), TextFields(), "a.json", skip))


@given(rows=ROWS, indent=st.sampled_from([None, 0, 2]), read=st.integers(1, 40), as_list=st.booleans())
def test_objects_come_out_one_by_one_however_the_file_is_laid_out(
    rows: list[dict[str, Any]], indent: int | None, read: int, as_list: bool
) -> None:
    """The standard library's own parser is the other side."""
    one_by_one = "\n".join(json.dumps(row, indent=indent) for row in rows)
    content = json.dumps(rows, indent=indent, ensure_ascii=False) if as_list else one_by_one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_READ_BYTES", read)
        found = values(content.encode())
        assert [text for _, _, text in found] == [row["text"] for row in rows]
        assert values(content.encode(), skip=3) == found[3:]
    assert [number for number, _, _ in found] == list(range(1, len(rows) + 1))


def test_the_line_of_an_object_is_where_it_starts() -> None:
    content = b'\xef\xbb\xbf[\n  {"text": "one"},\n\n  {\n "text": "two"}, 3,\n["x"]]\n'
    assert values(content) == [
        (1, 2, "one"),
        (2, 4, "two"),
        (3, 5, BadText("is not a JSON object but a number")),
        (4, 6, BadText("is not a JSON object but a list")),
    ]


@pytest.mark.parametrize(
    ("content", "line", "told"),
    [
        (b'[{"text": "x"},\n{"text": "y"}', 2, "the list does not end"),
        (b'[{"text": "x"},\n{"text": "y', 2, "Unterminated string"),
        (b'{"text": "x"}\n{"te', 2, "Unterminated string"),
        (b'[{"text": "x"}]\n{"text": "y"}', 2, "something follows the end of the list"),
        (b"[{'text': 1}]", 1, "Expecting property name"),
        (b'{"text": "caf\xe9"}', 1, "not UTF-8"),
        (b"[" * 100_000, 1, ""),
    ],
)
def test_a_damaged_file_is_named_with_its_line(content: bytes, line: int, told: str) -> None:
    with pytest.raises(UserError) as caught:
        values(content)
    assert caught.value.message.startswith(f"a.json:{line} is not JSON: ")
    assert told in caught.value.message


def test_a_file_of_many_objects_takes_the_memory_of_one() -> None:
    content = json.dumps([{"text": "some words " * 10}] * 50_000).encode()
    tracemalloc.start()
    count = sum(1 for _ in read_json_values(io.BytesIO(content), TextFields(), "a.json"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (count, peak < 1_000_000 < len(content)) == (50_000, True)


def test_documents_beyond_the_limit_are_named_and_those_behind_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 200)
    monkeypatch.setattr(module, "_READ_BYTES", 50)
    lines = b'{"text": "a"}\n{"text": "' + b"x" * 500 + b'"}\n{"text": "b"}\n'
    found = list(read_json_lines(io.BytesIO(lines), TextFields()))
    long = BadText("is longer than 200 bytes", "split it into several documents")
    assert found == [(1, "a"), (2, long), (3, "b")]
    with pytest.raises(UserError, match=r"a\.json:2 is not JSON: no object ends within 200 characters"):
        values(lines)
