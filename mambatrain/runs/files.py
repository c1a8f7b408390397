"""Files that appear whole or not at all, and their digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mambatrain.errors import UserError


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text_whole(path: Path, text: str) -> None:
    """Writes beside the target, then renames: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json_whole(path: Path, content: Any) -> None:
    """See write_text_whole."""
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
    """Turns 'no space left' into a sentence; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise UserError(
            f"the disk is full: {what} was not written", "free some space and start the same command again"
        ) from error
