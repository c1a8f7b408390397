"""Texts out of JSON: one object a line, or a file that is one list of objects (or objects one after the other)."""

from __future__ import annotations

import codecs
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import IO, Any

from mambatrain.data.text_fields import BadText, RowFields, json_name
from mambatrain.errors import UserError

MAX_DOCUMENT_BYTES = 1 << 28
"""The longest document, or line that holds one: it is in memory as a whole, some three times over."""

_READ_BYTES = 1 << 16
_WHITE_SPACE = " \t\n\r"


def read_json_lines(stream: IO[bytes], fields: RowFields, skip: int = 0) -> Iterator[tuple[int, str | BadText]]:
    """Line number, counted from 1, and its text; blank lines are passed over, and so are the first `skip` lines."""
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            _skip_line(stream, line)
            decoded: str | BadText = too_long(f"is longer than {MAX_DOCUMENT_BYTES:,} bytes")
        elif number <= skip or line.isspace():
            continue
        else:
            decoded = _decoded(line.removeprefix(BOM_UTF8) if number == 1 else line)
        del line  # a long one need not lie beside what is made of it
        row = decoded if isinstance(decoded, BadText) else _parsed(decoded)
        del decoded
        if number > skip:
            yield number, row if isinstance(row, BadText) else _text_of_row(row, fields)


def _skip_line(stream: IO[bytes], line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = stream.readline(_READ_BYTES)


def _decoded(line: bytes) -> str | BadText:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return not_utf8(error)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, and numbers beyond Python's digit limit
        return BadText(f"is not JSON: {error}")


def _text_of_row(row: Any, fields: RowFields) -> str | BadText:
    if not isinstance(row, dict):
        return BadText(f"is not a JSON object but {json_name(row)}")
    return fields.text_of(row)


def read_json_values(
    stream: IO[bytes], fields: RowFields, name: str, skip: int = 0
) -> Iterator[tuple[int, int, str | BadText]]:
    """Number of each object, counted from 1, the line it starts in, and its text; the first `skip` are passed over.

    An object is in memory at a time, whatever the size of the file.

    Raises:
        UserError: the file is not JSON, is truncated, or holds an object beyond MAX_DOCUMENT_BYTES.
    """
    for number, (line, row) in enumerate(_JsonValues(stream, name), 1):
        if number > skip:
            yield number, line, _text_of_row(row, fields)


class _JsonValues:
    """The values of a file, one by one, each with its line."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.stream = stream
        self.name = name
        self.text = ""
        self.at = 0  # what is before it is done
        self.line = 1
        self.ended = False
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        decoder = json.JSONDecoder()
        in_list = self._next_character() == "["
        if in_list:
            self._advance(self.at + 1)
        while (character := self._next_character()) is not None:
            if in_list and character == "]":
                self._advance(self.at + 1)
                if self._next_character() is not None:
                    raise self._damaged("something follows the end of the list")
                return
            yield self.line, self._value(decoder)
            if self._next_character() == ",":
                self._advance(self.at + 1)
        if in_list:
            raise self._damaged("the list does not end")

    def _value(self, decoder: json.JSONDecoder) -> Any:
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise self._damaged(str(error)) from None
            except ValueError as error:
                if self.ended:
                    raise self._damaged(getattr(error, "msg", str(error))) from None
            else:
                if end < len(self.text) or self.ended:  # a number may go on
                    self._advance(end)
                    return value
            if len(self.text) - self.at > MAX_DOCUMENT_BYTES:
                raise self._damaged(f"no object ends within {MAX_DOCUMENT_BYTES:,} characters")
            self._read(max(_READ_BYTES, len(self.text) - self.at))  # twice as much: parsing is linear in all

    def _next_character(self) -> str | None:
        """The next one that is not white space; None: the file has ended."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in _WHITE_SPACE:
                    return self.text[self.at]
                self._advance(self.at + 1)
            if self.ended:
                return None
            self._read(_READ_BYTES)

    def _advance(self, at: int) -> None:
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def _read(self, num_bytes: int) -> None:
        content = self.stream.read(num_bytes)
        self.ended = not content
        try:
            more = self._decode(content, final=self.ended)
        except UnicodeDecodeError as error:
            raise self._damaged(f"not UTF-8: {error.reason}") from None
        self.text, self.at = self.text[self.at :] + more, 0

    def _damaged(self, reason: str) -> UserError:
        hint = "such a file is one list of objects, or objects one after the other; copy it again if it was whole"
        return UserError(f"{self.name}:{self.line} is not JSON: {reason}", hint)


def too_long(what: str) -> BadText:
    """The reason for a document beyond MAX_DOCUMENT_BYTES."""
    return BadText(what, "split it into several documents")


def not_utf8(error: UnicodeDecodeError) -> BadText:
    """The reason for bytes that are no UTF-8."""
    byte = error.object[error.start]
    return BadText(f"is not UTF-8: {error.reason} (byte 0x{byte:02x})", "convert it, for example with iconv")
