"""Texts out of the rows of parquet and Arrow files; a few hundred rows are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from mambatrain.data.json_documents import not_utf8
from mambatrain.data.sources import SourceFile
from mambatrain.data.text_fields import BadText, RowFields
from mambatrain.errors import UserError

_ROWS_AT_ONCE = 256


def read_table(file: SourceFile, fields: RowFields, skip: int = 0) -> Iterator[tuple[int, float, str | BadText]]:
    """Row number, counted from 1, the fraction of the file that was read, and the row's text, from row `skip` + 1 on.

    Raises:
        UserError: the file is damaged, or a column is missing.
    """
    import pyarrow as pa

    number = 0
    with file.path.open("rb") as raw:
        try:
            batches = (
                _parquet_batches(file, raw, fields) if file.kind == "parquet" else _arrow_batches(file, raw, fields)
            )
            for fraction, batch in batches:
                columns = {name: batch.column(name) for name in fields.names or batch.schema.names}
                for row in range(max(0, skip - number), batch.num_rows):
                    yield number + row + 1, fraction, _text_of_row(columns, row, fields)
                number += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{file.name} is damaged or not {file.kind}{f' after row {number}' if number else ''}: {reason}",
                "copy or download it again",
            ) from error


def _parquet_batches(file: SourceFile, raw: IO[bytes], fields: RowFields) -> Iterator[tuple[float, Any]]:
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(raw)
    _check_columns(file, parquet.schema_arrow.names, fields)
    number, num_rows = 0, max(parquet.metadata.num_rows, 1)
    for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(fields.names) or None):
        number += batch.num_rows
        yield number / num_rows, batch


def _arrow_batches(file: SourceFile, raw: IO[bytes], fields: RowFields) -> Iterator[tuple[float, Any]]:
    """Both layouts of Arrow: the file, and the stream that the datasets package keeps."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(raw)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        raw.seek(0)
        reader = pa.ipc.open_stream(raw)
        batches = iter(reader)
    _check_columns(file, reader.schema.names, fields)
    for batch in batches:
        yield min(raw.tell() / max(file.num_bytes, 1), 1.0), batch


def _check_columns(file: SourceFile, columns: list[str], fields: RowFields) -> None:
    for name in fields.names:
        if name not in columns:
            raise UserError(f"{file.name} has no column `{name}`", fields.hint_for(name, columns))


def _text_of_row(columns: dict[str, Any], row: int, fields: RowFields) -> str | BadText:
    try:
        return fields.text_of({name: column[row].as_py() for name, column in columns.items()})
    except UnicodeDecodeError as error:
        return not_utf8(error)
