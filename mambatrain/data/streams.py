"""Sources that are no files yet: standard input, and data sets of the Hugging Face hub. They become files here."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from mambatrain.data.sources import HUB_PREFIX, SourceFile, described_file, is_stream
from mambatrain.data.text_fields import RowFields
from mambatrain.errors import UserError, nearest

StandardInputKind = Literal["jsonl", "txt"]

_HUB_NAME = re.compile(r"(?P<name>[^:@#]+)(:(?P<config>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>.+))?")
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class HubSource:
    """`hf://NAME[:CONFIG][@REVISION][#SPLIT]`. NAME may be a local folder that the datasets package reads."""

    name: str
    config: str | None
    revision: str | None
    split: str
    text: str
    """As the user typed it."""


def parse_hub_source(text: str) -> HubSource:
    """
    Raises:
        UserError: it is not spelled so.
    """
    match = _HUB_NAME.fullmatch(text.removeprefix(HUB_PREFIX))
    if match is None:
        hint = "hf://NAME[:CONFIG][@REVISION][#SPLIT], for example hf://roneneldan/TinyStories#validation"
        raise UserError(f"{text} is not the name of a data set", hint)
    return HubSource(match["name"], match["config"], match["revision"], match["split"] or "train", text)


def keep_streams(
    sources: Sequence[str | Path],
    folder: Path,
    fields: RowFields,
    standard_input: StandardInputKind = "jsonl",
    streaming: bool = False,
) -> list[str | Path | SourceFile]:
    """The sources with a file in the place of each stream.

    Standard input is copied into `folder`; a data set lies where the datasets package keeps it, or, with `streaming`,
    its text is copied into `folder`.

    Raises:
        UserError: standard input is named twice or is a terminal; a data set cannot be read.
    """
    found: list[str | Path | SourceFile] = []
    for number, source in enumerate(sources):
        if not is_stream(source):
            found.append(source)
        elif str(source).startswith(HUB_PREFIX):
            hub = parse_hub_source(str(source))
            kept = _stream_rows(hub, folder / f"hub-{number}.jsonl", fields) if streaming else _downloaded(hub)
            found += kept
        elif list(map(str, sources)).count("-") > 1:
            raise UserError("- (standard input) is named twice", "it can be read once")
        else:
            found.append(_copy_standard_input(folder, standard_input))
    return found


def _copy_standard_input(folder: Path, kind: StandardInputKind) -> SourceFile:
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError(
            "- reads standard input, and nothing is piped into it", "for example: zcat a.gz | mambatrain ..."
        )
    file = folder / f"standard_input.{kind}"
    with file.open("wb") as out:
        shutil.copyfileobj(sys.stdin.buffer, out, _COPY_BYTES)
    return described_file(file, "json lines" if kind == "jsonl" else "text", label="-")


def _downloaded(hub: HubSource) -> list[SourceFile]:
    """The Arrow files that the datasets package has made of the data set."""
    data = _load(hub, streaming=False)
    files = [Path(entry["filename"]) for entry in data.cache_files]
    if not files:
        raise UserError(f"{hub.text} has no files in the datasets package's cache", "--streaming reads it row by row")
    return [described_file(file, "arrow", label=f"{hub.text}/{number}") for number, file in enumerate(files)]


def _stream_rows(hub: HubSource, file: Path, fields: RowFields) -> list[SourceFile]:
    rows = _load(hub, streaming=True)
    with file.open("w", encoding="utf-8") as out:
        opened = iter(rows)
        try:
            for row in _named_errors(hub, opened):
                out.write(json.dumps({name: _plain(row[name]) for name in fields.names if name in row}) + "\n")
        finally:
            # A stream that is left before its end has threads of Arrow's that abort the interpreter when it ends
            # (github.com/apache/arrow/issues/45214); they end here, once nothing holds the stream any more.
            del opened, rows
            gc.collect()
        out.flush()
        os.fsync(out.fileno())
    return [described_file(file, "json lines", label=hub.text)]


def _plain(value: Any) -> Any:
    """What is not text is told by its kind when it is read; JSON need not hold an image."""
    return value if value is None or isinstance(value, str | int | float | bool | list | dict) else str(type(value))


def _named_errors(hub: HubSource, rows: Iterator[Any]) -> Iterator[dict[str, Any]]:
    from datasets.exceptions import DatasetsError

    try:
        yield from rows
    except (OSError, ValueError, DatasetsError) as error:
        raise _unreadable(hub, error) from error


def _load(hub: HubSource, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        splits = load_dataset(hub.name, hub.config, revision=hub.revision, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:  # OSError: the network, too
        raise _unreadable(hub, error) from error
    names = cast(dict[str, Any], splits)
    if hub.split not in names:
        close = nearest(hub.split, list(names))
        hint = f"did you mean #{close}?" if close else f"it has: {', '.join(f'#{name}' for name in names)}"
        raise UserError(f"{hub.text} has no split `{hub.split}`", hint)
    return names[hub.split]


def _unreadable(hub: HubSource, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    hint = "hf://NAME[:CONFIG][@REVISION][#SPLIT] names a data set of the hub, or a folder that load_dataset can read"
    return UserError(f"{hub.text} cannot be read: {reason}", hint)
