"""An exported folder appears whole, is never written over by accident, and is not made twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mambatrain.errors import UserError
from mambatrain.files import sha256_of, write_errors_named, write_json_whole

RECORD_FILE = "export.json"
"""What the folder was made of and how it was checked."""


@dataclass(frozen=True)
class MadeOf:
    """What decides the tensors and the tokenizer of an export."""

    weights: str
    """Digest of the weights."""
    format: str
    dtype: str
    tokenizer: str | None
    """Digest of tokenizer.json."""
    end_of_document: str | None
    chat_template: str | None = None
    """Digest of it."""


@dataclass(frozen=True)
class Exported:
    """A folder that was written, read again and compared, now or by an earlier call."""

    folder: Path
    reused: bool
    """Whether it was there already, made of the same."""
    reader: str
    """What read it for the comparison."""
    largest_difference: float
    """Between the reader's logits and ours, relative to the largest logit."""


def find_finished_export(out: Path, made_of: MadeOf) -> Exported | None:
    """The export that is already there, if it is made of the same and its files are unchanged."""
    try:
        record = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
        if record["made_of"] != asdict(made_of):
            return None
        if any(sha256_of(out / name) != digest for name, digest in record["files"].items()):
            return None
        check = record["check"]
        return Exported(out, True, str(check["reader"]), float(check["largest_difference"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def placing_whole(out: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a folder beside `out` to write into, and renames it to `out` when the body has ended well.

    Raises:
        UserError: `out` exists and may not be replaced, or it cannot be written; nothing is left behind.
    """
    refuse_existing(out, overwrite)
    named, out = out, out.absolute()  # `.` has no name
    writing, replaced = out.with_name(f".exporting-{out.name}"), out.with_name(f".replaced-{out.name}")
    shutil.rmtree(writing, ignore_errors=True)  # of an earlier export that was killed
    try:
        with write_errors_named(named):
            writing.mkdir(parents=True)
            yield writing
            if out.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                out.rename(replaced)
            writing.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raises UserError where `out` holds something that an export must not replace."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file", "name a folder")
    if not overwrite:
        raise UserError(
            f"{out} exists and was made of something else", "--overwrite replaces it, or name another folder"
        )
    if not (out / "config.json").is_file():
        raise UserError(f"{out} is no folder of weights, so it is not replaced", "name another folder")


def write_record(folder: Path, made_of: MadeOf, reader: str, largest_difference: float) -> None:
    """Written last: digests of what was compared, and how. The model card is the owner's to edit."""
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != "README.md"}
    record: dict[str, Any] = {
        "made_of": asdict(made_of),
        "check": {"reader": reader, "largest_difference": largest_difference},
        "files": files,
    }
    write_json_whole(folder / RECORD_FILE, record)
