"""Files that may be packed with gzip or zstd, read from their beginning to their end."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, cast

from mambatrain.data.sources import SourceFile
from mambatrain.errors import UserError

_AGAIN = "copy or download it again"
_BUFFER_BYTES = 8192  # lines come out of C; what is damaged is told to within so much text


@contextmanager
def open_unpacked(file: SourceFile, place: Callable[[], str]) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The bytes of a file, unpacked, and how many bytes of the disk were read so far.

    Args:
        place: how far the reader has come, for the sentence that tells of damage: ` after line 7`.

    Raises:
        UserError: the file is truncated or damaged. (An OSError of the system passes.)
    """
    with file.path.open("rb") as raw:
        if file.compression != "none" and file.num_bytes == 0:
            raise UserError(f"{file.name} is empty, not a {file.compression} file", _AGAIN)
        try:
            yield _unpacked(file, raw), raw.tell
        except EOFError:
            raise UserError(f"{file.name} is truncated{place()}", _AGAIN) from None
        except (gzip.BadGzipFile, zlib.error, _zstd_error(file)) as error:
            raise UserError(f"{file.name} is damaged{place()}: {error}", _AGAIN) from error


def _unpacked(file: SourceFile, raw: IO[bytes]) -> IO[bytes]:
    if file.compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER_BYTES)
    if file.compression == "zstd":
        if sys.version_info >= (3, 14):
            from compression.zstd import ZstdFile
        else:
            from backports.zstd import ZstdFile
        return io.BufferedReader(cast(io.RawIOBase, ZstdFile(raw)), _BUFFER_BYTES)
    return raw


def _zstd_error(file: SourceFile) -> type[Exception]:
    """The error of damaged zstd data; the package is imported for such files alone."""
    if file.compression != "zstd":
        return gzip.BadGzipFile
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdError
    else:
        from backports.zstd import ZstdError
    return cast(type[Exception], ZstdError)
