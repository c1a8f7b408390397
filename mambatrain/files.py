"""Files that appear whole or not at all, their digests, and the sentence for a disk that does not take them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mambatrain.errors import UserError

# A disk quota and a limit on the size of files end a write just as a full disk does.
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OS_ERROR_NUMBER = re.compile(r"os error (\d+)")  # how the safetensors library tells of the system's errors


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes_whole(path: Path, content: bytes) -> None:
    """Writes beside the target, then renames: whenever the machine stops, there is the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_text_whole(path: Path, text: str) -> None:
    """See write_bytes_whole."""
    write_bytes_whole(path, text.encode())


def write_json_whole(path: Path, content: Any) -> None:
    """See write_bytes_whole."""
    write_text_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: a rename is only as safe as the folder's own entry."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Makes a file's bytes durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def explaining_full_disk(what: str) -> Iterator[None]:
    """Turns 'no space left' into a sentence about work that can be continued; other errors pass.

    Raises:
        UserError: the disk is full.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if _error_number(error) not in FULL_DISK:
            raise
        raise UserError(
            f"the disk is full: {what} was not written", "free some space and start the same command again"
        ) from error


@contextmanager
def write_errors_named(out: str | Path) -> Iterator[None]:
    """Turns an error of the operating system into one that names the output: a full disk, a folder of another's.

    Raises:
        UserError: `out` cannot be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number is None:  # said by a library, not by the system: no matter of the place
            raise
        file = getattr(error, "filename", None)
        reason = os.strerror(number).lower() + (f" ({file})" if file else "")
        full = "nothing was kept of it; make room and run again"
        hint = full if number in FULL_DISK else "name a place where files can be written"
        raise UserError(f"{out} cannot be written: {reason}", hint) from error


def _error_number(error: Exception) -> int | None:
    """The operating system's number of an error, None where it has none."""
    if isinstance(error, OSError):
        return error.errno
    told = _OS_ERROR_NUMBER.search(str(error))
    return int(told[1]) if told else None
