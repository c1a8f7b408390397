"""One file of documents and the record of where they come from: what every script of this folder ends in."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mambatrain.data.staging import only_writer_of
from mambatrain.errors import UserError
from mambatrain.files import sha256_of, write_errors_named, write_json_whole

LINE_INTERVAL_SECONDS = 5.0
MAX_FAILURES_NAMED = 20


@dataclass(frozen=True)
class About:
    """What a corpus is."""

    name: str
    source: str
    licence: str


@dataclass(frozen=True)
class Failure:
    """A document that could not be read."""

    name: str
    reason: str


Row = dict[str, Any]  # a JSON object; "text" is the document, or "messages" the conversation


def write_corpus(
    out: Path,
    about: About,
    options: Row,
    rows: Callable[[], Iterable[Row | Failure]],
    expected_documents: int | None,
    overwrite: bool,
) -> None:
    """Writes rows as JSON lines to `out` and their record to `OUT.manifest.json`, and says so on stdout.

    Nothing is written again where the record tells of the same corpus with the same options and the file is intact.

    Args:
        options: whatever decides the rows.
        expected_documents: for the time that is left; None where it is not known.

    Raises:
        UserError: `out` was made from something else, cannot be written, or there are no rows.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out} does not end in .jsonl", f"for example --out {out.with_suffix('.jsonl')}")
    record_file = out.with_name(out.name + ".manifest.json")
    if out.exists() and not overwrite:
        _check_same(out, record_file, {"about": asdict(about), "options": options})
        record = json.loads(record_file.read_bytes())
        print(f"{out} was already written; it is used as it is")
    else:
        with write_errors_named(out), only_writer_of(out):
            record = {"about": asdict(about), "options": options, **_write_rows(out, rows(), expected_documents)}
            write_json_whole(record_file, record)
    print(f"documents  {record['num_documents']:,}")
    print(f"failures   {record['num_failures']:,}")
    print(f"text       {record['num_text_bytes']:,} bytes")
    print(f"licence    {about.licence}")
    print(f"written to {out}")


def texts_of(row: Row) -> list[str]:
    """The text of a document, or those of a conversation's messages."""
    return [row["text"]] if "text" in row else [message["content"] for message in row["messages"]]


def run_script(main: Callable[[], None]) -> None:
    """Runs a script: a mistake of the user's gets a sentence and a hint, Ctrl-C a word."""
    try:
        main()
    except UserError as error:
        hint = f"\n\nhint: {error.hint}" if error.hint else ""
        sys.exit(f"error: {error.message}{hint}")  # on stderr, with exit code 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _check_same(out: Path, record_file: Path, wanted: Row) -> None:
    hint = "--overwrite writes it anew, or name another --out"
    if not record_file.is_file():
        raise UserError(f"{out} exists and has no record of where it comes from ({record_file.name})", hint)
    try:
        record = json.loads(record_file.read_bytes())
        found = {key: record[key] for key in wanted}
        digest = record["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record_file} is damaged: {error!r}", hint) from error
    for part, value in wanted.items():
        differing = [key for key in {**found[part], **value} if found[part].get(key) != value.get(key)]
        if differing:
            lines = "\n".join(f"  {key}: {found[part].get(key)} -> {value.get(key)}" for key in differing)
            raise UserError(f"{out} exists and was made otherwise:\n{lines}", hint)
    if sha256_of(out) != digest:
        raise UserError(f"{out} was changed since it was written", hint)


def _write_rows(out: Path, rows: Iterable[Row | Failure], expected_documents: int | None) -> Row:
    """Streams rows into place and counts them; a file appears only when all are written."""
    num_documents = num_text_bytes = num_failures = 0
    failures: list[str] = []
    digest = hashlib.sha256()
    started = last_line = 0.0
    with _appearing_whole(out) as file:
        for row in rows:
            if isinstance(row, Failure):
                num_failures += 1
                if num_failures <= MAX_FAILURES_NAMED:
                    failures.append(f"{row.name}: {row.reason}")
                    print(f"left out: {failures[-1]}", file=sys.stderr)
                continue
            if not num_documents:
                started = last_line = time.monotonic()  # now the source is open, and the rate can be told
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            digest.update(line)
            num_documents += 1
            num_text_bytes += sum(len(text.encode()) for text in texts_of(row))
            if time.monotonic() - last_line >= LINE_INTERVAL_SECONDS:
                last_line = time.monotonic()
                seconds = last_line - started
                print(_progress_line(num_documents, num_text_bytes, expected_documents, seconds), file=sys.stderr)
        if not num_documents:
            raise UserError(f"there is nothing to write to {out}", "check the source that was named")
    counts = {"num_documents": num_documents, "num_text_bytes": num_text_bytes, "num_failures": num_failures}
    return {**counts, "failures": failures, "num_bytes": out.stat().st_size, "sha256": digest.hexdigest()}


@contextmanager
def _appearing_whole(out: Path) -> Iterator[IO[bytes]]:
    partial = out.with_name(f".{out.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)


def _progress_line(num_documents: int, num_bytes: int, expected_documents: int | None, seconds: float) -> str:
    line = f"{num_documents:,} documents, {num_bytes / 1e6:.1f} MB of text"
    if expected_documents is None or expected_documents <= num_documents:
        return line
    left = int((expected_documents - num_documents) * seconds / num_documents)
    return f"{line} of about {expected_documents:,} documents, {left // 60}:{left % 60:02d} left"
