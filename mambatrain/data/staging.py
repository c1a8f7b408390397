"""A folder that appears whole or not at all: made under a temporary name beside its place, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from mambatrain.errors import UserError
from mambatrain.files import fsync_folder


@contextmanager
def only_writer_of(out: str | Path) -> Iterator[None]:
    """Keeps other processes from writing a file or a folder meanwhile, by `.NAME.lock` beside it.

    Raises:
        UserError: another process is writing it.
    """
    place = Path(os.path.realpath(out))
    lock_file = place.with_name(f".{place.name}.lock")
    lock = _take_lock(lock_file, out)
    try:
        yield
    finally:
        lock_file.unlink()
        os.close(lock)


def _take_lock(lock_file: Path, out: str | Path) -> int:
    """The descriptor of the locked file."""
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            hint = "wait for it, or name another --out"
            raise UserError(f"{out} is being written by another process", hint) from None
        # Whoever had the lock before may have removed its file since it was opened here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), lock_file.stat()):
                return lock
        os.close(lock)


class StagedFolder:
    """A folder in the making, `.NAME.partial` beside `NAME`, while `.NAME.lock` keeps other processes away.

    Leaving the block without `publish` removes it, whatever the reason. What a killed process left is cleared away.

    `work` is the place of another folder, `.NAME.work`, for what a later process may go on with: whoever wants it makes
    it. It is left where the block was interrupted, and removed when the block ends, or in an error of the user's or the
    disk's.

    Raises (on entry):
        UserError: another process is making the same folder.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self._place = Path(os.path.realpath(self.out))  # a link is kept, and what it leads to is replaced
        self.path = self._beside("partial")
        self.work = self._beside("work")
        self._old = self._beside("old")
        self._lock = only_writer_of(self.out)

    def __enter__(self) -> Self:
        self._lock.__enter__()
        try:
            if self._old.exists() and not self._place.exists():  # killed in the middle of `publish`
                self._old.rename(self._place)
            _remove(self._old)
            _remove(self.path)
            self.path.mkdir()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _remove(self.path)
            if kind is None or issubclass(kind, UserError | OSError):
                _remove(self.work)
        finally:
            self._lock.__exit__(None, None, None)

    def publish(self) -> None:
        """Puts the folder in its place; one that is there already is replaced. Its files must have been synced."""
        fsync_folder(self.path)
        if self._place.exists():
            self._place.rename(self._old)
        self.path.rename(self._place)
        fsync_folder(self._place.parent)
        _remove(self._old)

    def _beside(self, what: str) -> Path:
        return self._place.with_name(f".{self._place.name}.{what}")


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
