"""Which files a corpus is made of: files, folders and lists of them, in an order that depends on their names alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mambatrain.errors import UserError, nearest

Kind = Literal["text", "python", "json lines", "gzipped json lines", "parquet"]

KIND_OF_ENDING: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".py": "python",
    ".jsonl": "json lines",
    ".jsonl.gz": "gzipped json lines",
    ".parquet": "parquet",
}
_ENDINGS = ", ".join(KIND_OF_ENDING)


@dataclass(frozen=True)
class SourceFile:
    """One file of text. `path` is what the user typed, or lies below it."""

    path: Path
    kind: Kind
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Sources:
    """The files of a corpus in reading order, and what was seen in its folders but has no ending that is read."""

    files: tuple[SourceFile, ...]
    unread: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk (compressed where the file is)."""
        return sum(file.num_bytes for file in self.files)


def find_sources(names: Sequence[str | Path]) -> Sources:
    """Finds the files of a corpus.

    A folder stands for every file below it that has a known ending, sorted by path; hidden files and folders (a
    leading dot) are passed over. A file that is named itself must have a known ending.

    Raises:
        UserError: nothing at a name, an unknown ending, a file named twice, or no file at all.
    """
    files: dict[Path, SourceFile] = {}  # by real path: a file that is read twice would count twice
    unread: list[Path] = []
    for name in names:
        top = Path(name)
        if top.is_dir():
            found = sorted(_files_below(top), key=lambda path: path.relative_to(top).as_posix())
            if not any(kind_of(path) for path in found):
                raise UserError(f"{top} holds no text to read", f"files that are read end in {_ENDINGS}")
        else:
            found = [_named_file(top)]
        for path in found:
            kind = kind_of(path)
            if kind is None:
                unread.append(path)
                continue
            real = path.resolve()
            if real in files:
                raise UserError(f"{path} is named twice, the first time as {files[real].path}", "name each file once")
            status = path.stat()
            files[real] = SourceFile(path, kind, status.st_size, status.st_mtime_ns)
    if not files:
        raise UserError("no source is named", "name files or folders of text")
    return Sources(tuple(files.values()), tuple(unread))


def kind_of(path: Path) -> Kind | None:
    """What the ending says that a file holds; None where it says nothing known."""
    name = path.name.lower()
    return next((kind for ending, kind in KIND_OF_ENDING.items() if name.endswith(ending)), None)


def check_unchanged(files: Sequence[SourceFile]) -> None:
    """Refuses files that were written to since `find_sources` saw them.

    Raises:
        UserError: naming the first such file.
    """
    for file in files:
        status = file.path.stat() if file.path.exists() else None
        if status is None or (status.st_size, status.st_mtime_ns) != (file.num_bytes, file.modified_ns):
            raise UserError(f"{file.path} was changed while it was being read", "run this again once it stands still")


def missing_file(path: Path, hint: str) -> UserError:
    """The error for a path where nothing is, with the nearest name in its folder; `hint` where none is near."""
    if not path.parent.is_dir():
        return UserError(f"{path} does not exist", f"there is no folder {path.parent} either")
    close = nearest(path.name, sorted(entry.name for entry in path.parent.iterdir()))
    return UserError(f"{path} does not exist", f"did you mean {path.parent / close}?" if close else hint)


def _named_file(path: Path) -> Path:
    if not path.exists():
        raise missing_file(path, f"name folders, or files that end in {_ENDINGS}")
    if not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder", "write a stream to a file first")
    if kind_of(path) is None:
        hint = f"files that are read end in {_ENDINGS}"
        if path.suffix.lower() == ".json":
            hint += "; a .json file becomes a .jsonl file with one object a line"
        raise UserError(f"{path}: what `{path.suffix or path.name}` files hold is not known", hint)
    return path


def _files_below(top: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder) / name for name in names if not name.startswith("."))
