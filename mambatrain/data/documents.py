"""Documents out of files of text, one after the other; whatever is wrong is named by file and line.

What is kept: the text as it stands, line ends (CRLF too) included, with two exceptions. A byte-order mark that opens
a .txt, .md or .jsonl file is a mark of the encoding, not text, and is dropped. A .py file is read as Python reads it
(`tokenize.open`): in the encoding it declares, with every line end as a newline.
"""

from __future__ import annotations

import gzip
import json
import tokenize
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from mambatrain.data.sources import SourceFile
from mambatrain.errors import UserError, nearest

MAX_BAD_NAMED = 20  # of the documents that were left out; all of them are counted


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `origin` is its file, or `file:line` (a parquet file's rows count as lines), counted from 1."""

    text: str
    origin: str


@dataclass(frozen=True, slots=True)
class BadDocument:
    """A place where no document could be read."""

    origin: str
    reason: str
    hint: str | None = None


class DocumentReader:
    """Reads the documents of files in their order, once.

    Args:
        files: from `find_sources`.
        text_field: the field of a JSON object, or the column of a parquet file, that holds the text.
        skip_bad: leave out documents that cannot be read, and count them, instead of stopping at the first.

    Attributes:
        bytes_read: of the files on disk, for a progress bar.
        num_bad: documents left out so far.
        bad: the first few of them, `origin reason`.
    """

    def __init__(self, files: Sequence[SourceFile], text_field: str = "text", skip_bad: bool = False) -> None:
        self.files = files
        self.text_field = text_field
        self.skip_bad = skip_bad
        self.bytes_read = 0
        self.num_bad = 0
        self.bad: list[str] = []

    def __iter__(self) -> Iterator[Document]:
        """
        Raises:
            UserError: a bad document (unless `skip_bad`), or a file that is damaged or cannot be opened.
        """
        for file, start in zip(self.files, _starts(self.files), strict=True):
            try:
                for document in self._read(file, start):
                    if isinstance(document, Document):
                        yield document
                    else:
                        self._leave_out(document)
            except OSError as error:
                raise UserError(
                    f"{file.path} cannot be read: {error.strerror or error}",
                    "it must be there to the end, and yours to read",
                ) from error
            self.bytes_read = start + file.num_bytes

    def _leave_out(self, bad: BadDocument) -> None:
        if not self.skip_bad:
            hint = "--skip-bad leaves such documents out and counts them"
            raise UserError(f"{bad.origin} {bad.reason}", f"{bad.hint}; {hint}" if bad.hint else hint)
        self.num_bad += 1
        if len(self.bad) < MAX_BAD_NAMED:
            self.bad.append(f"{bad.origin} {bad.reason}")

    def _read(self, file: SourceFile, start: int) -> Iterator[Document | BadDocument]:
        if file.kind == "text":
            yield _read_text(file)
        elif file.kind == "python":
            yield _read_python(file)
        elif file.kind == "parquet":
            for fraction, document in _read_parquet(file, self.text_field):
                self.bytes_read = start + int(fraction * file.num_bytes)
                yield document
        else:
            with file.path.open("rb") as raw:
                for document in _read_json_lines(file, raw, self.text_field):
                    self.bytes_read = start + raw.tell()
                    yield document


def _starts(files: Sequence[SourceFile]) -> list[int]:
    """Bytes of all files before each."""
    starts = [0]
    for file in files:
        starts.append(starts[-1] + file.num_bytes)
    return starts[:-1]


def _read_text(file: SourceFile) -> Document | BadDocument:
    content = file.path.read_bytes().removeprefix(BOM_UTF8)
    try:
        return Document(content.decode("utf-8"), str(file.path))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _not_utf8(f"{file.path}:{line}", error)


def _read_python(file: SourceFile) -> Document | BadDocument:
    try:
        with tokenize.open(file.path) as stream:
            return _checked(stream.read(), str(file.path))
    except UnicodeDecodeError as error:
        return BadDocument(str(file.path), f"is not in the encoding it declares ({error.encoding}): {error.reason}")
    except SyntaxError as error:  # an unknown encoding, or a header that is not UTF-8
        return BadDocument(str(file.path), f"declares no encoding it can be read in: {error.msg}")


def _read_json_lines(file: SourceFile, raw: IO[bytes], text_field: str) -> Iterator[Document | BadDocument]:
    """One JSON object a line; blank lines are passed over. `raw` is the open file, compressed or not."""
    if file.kind == "gzipped json lines" and file.num_bytes == 0:
        raise UserError(f"{file.path} is empty, not a gzip file", "copy or download it again")
    lines: Iterator[bytes] = iter(gzip.GzipFile(fileobj=raw) if file.kind == "gzipped json lines" else raw)
    number = 0
    while True:
        try:
            line = next(lines, None)
        except EOFError:
            raise UserError(f"{file.path} is truncated after line {number}", "copy or download it again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            message = f"{file.path} is damaged after line {number}: {error}"
            raise UserError(message, "copy or download it again") from error
        if line is None:
            return
        number += 1
        if number == 1:
            line = line.removeprefix(BOM_UTF8)
        if line.strip():
            yield _read_json_line(line, f"{file.path}:{number}", text_field)


def _read_json_line(line: bytes, origin: str, text_field: str) -> Document | BadDocument:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(origin, error)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, and numbers beyond Python's digit limit
        return BadDocument(origin, f"is not JSON: {error}")
    if not isinstance(row, dict):
        return BadDocument(origin, f"is not a JSON object but {_json_name(row)}")
    if text_field not in row:
        return BadDocument(origin, f"has no field `{text_field}`", _field_hint(text_field, list(row)))
    return _checked(row[text_field], origin, text_field)


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[tuple[float, Document | BadDocument]]:
    """Fraction of the file's rows read, and a row's text; a row group is in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file.path.open("rb") as raw:
        try:
            parquet = pq.ParquetFile(raw)
            columns = parquet.schema_arrow.names
            if text_field not in columns:
                raise UserError(f"{file.path} has no column `{text_field}`", _field_hint(text_field, columns))
            number, num_rows = 0, max(parquet.metadata.num_rows, 1)
            for batch in parquet.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0):
                    number += 1
                    yield number / num_rows, _read_scalar(value, f"{file.path}:{number}", text_field)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{file.path} is damaged or not parquet: {reason}", "copy or download it again") from error


def _read_scalar(value: Any, origin: str, text_field: str) -> Document | BadDocument:
    try:
        return _checked(value.as_py(), origin, text_field)
    except UnicodeDecodeError as error:
        return _not_utf8(origin, error)


def _checked(text: Any, origin: str, text_field: str = "text") -> Document | BadDocument:
    """A value that is to be text. JSON can spell lone surrogates (`"\\ud800"`), which no UTF-8 text holds."""
    if not isinstance(text, str):
        return BadDocument(origin, f"holds {_json_name(text)} in `{text_field}`, not text")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return BadDocument(origin, f"is not UTF-8: a lone surrogate at character {error.start}")
    return Document(text, origin)


def _json_name(value: Any) -> str:
    names = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _not_utf8(origin: str, error: UnicodeDecodeError) -> BadDocument:
    byte = error.object[error.start]
    return BadDocument(
        origin, f"is not UTF-8: {error.reason} (byte 0x{byte:02x})", "convert it, for example with iconv"
    )


def _field_hint(text_field: str, fields: list[str]) -> str:
    close = nearest(text_field, fields)
    return f"--text-field {close}" if close else f"--text-field names one of: {', '.join(fields) or 'it has none'}"
