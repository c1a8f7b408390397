"""Which files a corpus is made of: files, folders, patterns, in an order that depends on their names alone.

Standard input (`-`) and data sets of the Hugging Face hub (`hf://...`) are sources, too: `streams.py` makes files of
them.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mambatrain.errors import UserError, nearest

Kind = Literal["text", "python", "json lines", "json", "parquet", "arrow"]
Compression = Literal["none", "gzip", "zstd"]

_CODE = ".c .h .cc .hh .cpp .hpp .cu .cuh .cs .go .java .jl .js .kt .lua .m .ml .php .pl .r .rb .rs .scala .sh .sql .ts"
_MARKUP = ".txt .md .rst .tex .html .xml .css"
KIND_OF_ENDING: dict[str, Kind] = {
    **dict.fromkeys((*_MARKUP.split(), *_CODE.split()), "text"),
    ".py": "python",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSION_OF_ENDING: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSIBLE: tuple[Kind, ...] = ("text", "json lines", "json")
ENDINGS_TOLD = ".txt, .md, .py and other code, .jsonl, .json (these with .gz or .zst behind), .parquet, .arrow"

STANDARD_INPUT = "-"
HUB_PREFIX = "hf://"


@dataclass(frozen=True)
class SourceFile:
    """One file of text.

    Attributes:
        label: how it is called in messages and records where that is not its path: what the user typed.
    """

    path: Path
    kind: Kind
    num_bytes: int
    modified_ns: int
    compression: Compression = "none"
    label: str = ""

    @property
    def name(self) -> str:
        """What the user knows it by."""
        return self.label or str(self.path)

    @property
    def kind_name(self) -> str:
        """`gzipped json lines`: the kind with the compression, for records."""
        return {"none": "", "gzip": "gzipped ", "zstd": "zstd "}[self.compression] + self.kind


@dataclass(frozen=True)
class Sources:
    """The files of a corpus in reading order, and what was seen in its folders but has no ending that is read."""

    files: tuple[SourceFile, ...]
    unread: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk (compressed where the file is)."""
        return sum(file.num_bytes for file in self.files)


def is_stream(name: str | Path) -> bool:
    """Whether a source is no file yet: standard input, or a data set of the hub."""
    return str(name) == STANDARD_INPUT or str(name).startswith(HUB_PREFIX)


def find_sources(names: Sequence[str | Path | SourceFile]) -> Sources:
    """Finds the files of a corpus.

    A folder stands for every file below it that has a known ending, sorted by path; hidden files and folders (a
    leading dot) are passed over, and so are .json files, which in folders mostly hold settings. A pattern (`*`, `?`,
    `[...]`, `**`) stands for the files that fit, sorted. A file that is named itself must have a known ending. A
    `SourceFile` stands for itself.

    Raises:
        UserError: nothing at a name, an unknown ending, a file named twice, or no file at all.
    """
    files: dict[Path, SourceFile] = {}  # by real path: a file that is read twice would count twice
    unread: list[Path] = []
    for name in names:
        found, passed_over = ([name], []) if isinstance(name, SourceFile) else _find(Path(name))
        unread += passed_over
        for file in found:
            real = file.path.resolve()
            if real in files:
                raise UserError(f"{file.name} is named twice, the first time as {files[real].name}", "name it once")
            files[real] = file
    if not files:
        raise UserError("no source is named", "name files or folders of text")
    return Sources(tuple(files.values()), tuple(unread))


def kind_of(path: Path) -> tuple[Kind, Compression] | None:
    """What the ending says that a file holds; None where it says nothing known."""
    name = path.name.lower()
    compression: Compression = "none"
    for ending, packed in COMPRESSION_OF_ENDING.items():
        if name.endswith(ending):
            name, compression = name.removesuffix(ending), packed
    stem, dot, ending = name.rpartition(".")
    kind = KIND_OF_ENDING.get(dot + ending) if stem or dot else None
    if kind is None or (compression != "none" and kind not in _COMPRESSIBLE):
        return None
    return kind, compression


def described_file(path: Path, kind: Kind, compression: Compression = "none", label: str = "") -> SourceFile:
    """A file as it stands on the disk now."""
    status = path.stat()
    return SourceFile(path, kind, status.st_size, status.st_mtime_ns, compression, label)


def check_unchanged(files: Sequence[SourceFile]) -> None:
    """Refuses files that were written to since `find_sources` saw them.

    Raises:
        UserError: naming the first such file.
    """
    for file in files:
        status = file.path.stat() if file.path.exists() else None
        if status is None or (status.st_size, status.st_mtime_ns) != (file.num_bytes, file.modified_ns):
            raise UserError(f"{file.name} was changed while it was being read", "run this again once it stands still")


def missing_file(path: Path, hint: str) -> UserError:
    """The error for a path where nothing is, with the nearest name in its folder; `hint` where none is near."""
    if not path.parent.is_dir():
        return UserError(f"{path} does not exist", f"there is no folder {path.parent} either")
    close = nearest(path.name, sorted(entry.name for entry in path.parent.iterdir()))
    return UserError(f"{path} does not exist", f"did you mean {path.parent / close}?" if close else hint)


def _find(top: Path) -> tuple[list[SourceFile], list[Path]]:
    """The files that a name stands for, and those beside them that are not read."""
    if top.is_dir():
        paths = sorted(_files_below(top), key=lambda path: path.relative_to(top).as_posix())
        kinds = {path: kind for path in paths if (kind := kind_of(path)) and kind[0] != "json"}
    elif glob.has_magic(str(top)) and not top.exists():
        paths = sorted(path for path in map(Path, glob.glob(str(top), recursive=True)) if path.is_file())  # noqa: PTH207
        kinds = {path: kind for path in paths if (kind := kind_of(path))}
    else:
        return [_named_file(top)], []
    if not kinds:
        what = "holds no text to read" if top.is_dir() else "fits no file of text"
        raise UserError(f"{top} {what}", f"files that are read end in {ENDINGS_TOLD}")
    return [described_file(path, *kind) for path, kind in kinds.items()], [path for path in paths if path not in kinds]


def _named_file(path: Path) -> SourceFile:
    if not path.exists():
        raise missing_file(path, f"name folders, or files that end in {ENDINGS_TOLD}")
    if not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder", "`-` reads a stream from standard input")
    kind = kind_of(path)
    if kind is None:
        hint = f"files that are read end in {ENDINGS_TOLD}"
        raise UserError(f"{path}: what `{path.suffix or path.name}` files hold is not known", hint)
    return described_file(path, *kind)


def _files_below(top: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder) / name for name in names if not name.startswith("."))
