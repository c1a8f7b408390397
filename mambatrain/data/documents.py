"""Documents out of files of text, one after the other; whatever is wrong is named by file and line.

What is kept: the text as it stands, line ends (CRLF too) and NUL characters included, with two exceptions. A byte-order
mark that opens a file of text or JSON is a mark of the encoding, not text, and is dropped. A .py file is read as Python
reads it (`tokenize.open`): in the encoding it declares, with every line end as a newline.
"""

from __future__ import annotations

import io
import tokenize
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mambatrain.data.compressed import open_unpacked
from mambatrain.data.json_documents import (
    MAX_DOCUMENT_BYTES,
    not_utf8,
    read_json_lines,
    read_json_values,
    too_long,
)
from mambatrain.data.sources import SourceFile
from mambatrain.data.table_documents import read_table
from mambatrain.data.text_fields import BadText, RowFields, TextFields
from mambatrain.errors import UserError

MAX_BAD_NAMED = 20  # of the documents that were left out; all of them are counted


class Place(NamedTuple):
    """How far a corpus was read: this many files, and this many lines, rows or objects of the one after them."""

    num_files: int = 0
    num_units: int = 0


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `origin` is its file, or `file:line` (a table's rows count as lines), counted from 1."""

    text: str
    origin: str


class DocumentReader:
    """Reads the documents of files in their order, once.

    Args:
        files: from `find_sources`.
        fields: what of a JSON object or a table's row is the text.
        skip_bad: leave out documents that cannot be read, and count them, instead of stopping at the first.
        start: where to begin, as `place` told it.
        how_to_skip: what to say to a user who stands before the first.

    Attributes:
        place: behind the last document that was given.
        bytes_read: of the files on disk, for a progress bar.
        num_bad: documents left out since `start`.
        bad: the first few of them, `origin reason`.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        fields: RowFields | None = None,
        skip_bad: bool = False,
        start: Place = Place(),  # noqa: B008  (frozen)
        how_to_skip: str = "--skip-bad leaves such documents out and counts them",
    ) -> None:
        self.files = files
        self.fields: RowFields = fields or TextFields()
        self.how_to_skip = how_to_skip
        self.skip_bad = skip_bad
        self.place = start
        self.bytes_read = sum(file.num_bytes for file in files[: start.num_files])
        self.num_bad = 0
        self.bad: list[str] = []

    def __iter__(self) -> Iterator[Document]:
        """
        Raises:
            UserError: a bad document (unless `skip_bad`), or a file that is damaged or cannot be opened.
        """
        for number in range(self.place.num_files, len(self.files)):
            file, before = self.files[number], self.bytes_read
            try:
                for unit, origin, num_bytes, text in self._read(file, self.place.num_units):
                    self.bytes_read = before + num_bytes
                    self.place = Place(number, unit)
                    if isinstance(text, str):
                        yield Document(text, origin)
                    else:
                        self.leave_out(origin, text)
            except OSError as error:
                raise UserError(
                    f"{file.name} cannot be read: {error.strerror or error}",
                    "it must be there to the end, and yours to read",
                ) from error
            self.bytes_read = before + file.num_bytes
            self.place = Place(number + 1)

    def leave_out(self, origin: str, bad: BadText) -> None:
        """Counts a document that cannot be used.

        Raises:
            UserError: they are not to be left out.
        """
        if not self.skip_bad:
            hint = self.how_to_skip
            raise UserError(f"{origin} {bad.reason}", f"{bad.hint}; {hint}" if bad.hint else hint)
        self.num_bad += 1
        if len(self.bad) < MAX_BAD_NAMED:
            self.bad.append(f"{origin} {bad.reason}")

    def _read(self, file: SourceFile, skip: int) -> Iterator[tuple[int, str, int, str | BadText]]:
        """Number of each unit, where it is from, the bytes of the file read with it, and its text."""
        unit = skip
        if file.kind in ("parquet", "arrow"):
            for unit, fraction, text in read_table(file, self.fields, skip):
                yield unit, f"{file.name}:{unit}", int(fraction * file.num_bytes), text
            return
        told = {"json lines": " after line", "json": " after object"}.get(file.kind)
        with open_unpacked(file, lambda: f"{told} {unit}" if told else "") as (stream, bytes_read):
            if file.kind == "json lines":
                for unit, text in read_json_lines(stream, self.fields, skip):
                    yield unit, f"{file.name}:{unit}", bytes_read(), text
            elif file.kind == "json":
                for unit, line, text in read_json_values(stream, self.fields, file.name, skip):
                    yield unit, f"{file.name}:{line}", bytes_read(), text
            elif skip == 0:
                bad_line, text = _text_of_file(file, stream.read(MAX_DOCUMENT_BYTES + 1))
                yield 1, file.name if bad_line is None else f"{file.name}:{bad_line}", file.num_bytes, text


def _text_of_file(file: SourceFile, content: bytes) -> tuple[int | None, str | BadText]:
    """The text of a file that is one document; where it is bad, the line (None: the file as a whole)."""
    if len(content) > MAX_DOCUMENT_BYTES:
        return None, too_long(f"is longer than the {MAX_DOCUMENT_BYTES:,} bytes that a document may have")
    if file.kind == "python":
        return None, _text_of_python(content)
    try:
        return None, content.removeprefix(BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        return error.object.count(b"\n", 0, error.start) + 1, not_utf8(error)


def _text_of_python(content: bytes) -> str | BadText:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        with io.TextIOWrapper(io.BytesIO(content), encoding) as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        return BadText(f"is not in the encoding it declares ({error.encoding}): {error.reason}")
    except SyntaxError as error:  # an unknown encoding, or a header that is not UTF-8
        return BadText(f"declares no encoding it can be read in: {error.msg}")
    return TextFields().text_of({"text": text})
