"""Which field of a row is the text, or how several of them make one."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from mambatrain.errors import UserError, nearest

BETWEEN_TEXTS = "\0\0"
"""What `TextFields.everything` puts between two texts."""
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True, slots=True)
class BadText:
    """Why a row gives no text."""

    reason: str
    hint: str | None = None


class RowFields(Protocol):
    """What is taken out of a row, as one text."""

    names: tuple[str, ...]
    """The fields that are looked at; none: all of them."""

    def text_of(self, row: Mapping[str, Any]) -> str | BadText:
        """The text of a row."""

    def hint_for(self, missing: str, fields: list[str]) -> str:
        """What to type where a field is not there."""


class TextFields:
    r"""Takes the text out of rows: one field, or a template over several such as `{title}\n\n{body}`.

    In a template `\n`, `\t` and `\\` stand for a line end, a tabulator and a backslash, `{{` and `}}` for braces.

    Attributes:
        names: the fields that are looked at; none: all of them.

    Raises:
        UserError: the template is none.
    """

    def __init__(self, text_field: str = "text", template: str | None = None) -> None:
        self.text_field = text_field
        self._parts = None if template is None else _parse(template)
        names = [text_field] if self._parts is None else [name for _, name in self._parts if name is not None]
        self.names: tuple[str, ...] = tuple(dict.fromkeys(names))

    @classmethod
    def everything(cls) -> Self:
        """Takes every text that a row holds, however deep, with BETWEEN_TEXTS between them."""
        fields = cls()
        fields.names = ()
        return fields

    def text_of(self, row: Mapping[str, Any]) -> str | BadText:
        """The text of a row."""
        if not self.names:
            return BETWEEN_TEXTS.join(_texts_within(row))
        for name in self.names:
            if name not in row:
                return BadText(f"has no field `{name}`", self.hint_for(name, list(row)))
            bad = _why_no_text(row[name], name)
            if bad is not None:
                return bad
        if self._parts is None:
            text: str = row[self.text_field]
            return text
        return "".join(before + (row[name] if name is not None else "") for before, name in self._parts)

    def hint_for(self, missing: str, fields: list[str]) -> str:
        """What to type where a field is not there."""
        close = nearest(missing, fields)
        if self._parts is not None:
            return f"did you mean {{{close}}}?" if close else f"--template may name: {', '.join(fields) or 'nothing'}"
        return f"--text-field {close}" if close else f"--text-field names one of: {', '.join(fields) or 'it has none'}"


def _texts_within(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_within(part)


def _why_no_text(value: Any, name: str) -> BadText | None:
    """JSON can spell lone surrogates (`"\\ud800"`), which no UTF-8 text holds."""
    if not isinstance(value, str):
        return BadText(f"holds {json_name(value)} in `{name}`, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return BadText(f"is not UTF-8: a lone surrogate at character {error.start}")
    return None


def json_name(value: Any) -> str:
    """What a value that is not text is called."""
    names = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Literal text and the field behind it, in turn."""
    try:
        parts = list(string.Formatter().parse(_unescape(template)))
    except ValueError as error:
        raise UserError(
            f"--template {template!r}: {error}", "{name} stands for a field, {{ and }} for braces"
        ) from None
    for _, name, specification, conversion in parts:
        if name == "" or specification or conversion:
            hint = "a field is its name in braces, for example {title}"
            raise UserError(f"--template {template!r} has a field that is not just a name", hint)
    if not any(name is not None for _, name, _, _ in parts):
        raise UserError(f"--template {template!r} names no field", "for example --template '{title}\\n\\n{body}'")
    return [(before, name) for before, name, _, _ in parts]


def _unescape(template: str) -> str:
    pieces, characters = [], iter(template)
    for character in characters:
        if character == "\\":
            following = next(characters, "")
            pieces.append(_ESCAPES.get(following, character + following))
        else:
            pieces.append(character)
    return "".join(pieces)
