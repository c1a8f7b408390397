"""A run on another disk or in an object store, as one folder of files under any fsspec URL.

    TARGET/recipe.yaml, log.jsonl, run.json, ...          the run's own files
    TARGET/checkpoints/step-00000100/model.safetensors    the checkpoints that were asked for
    TARGET/archive.json                                   size and SHA-256 of each; written last

Every file is read back and its digest compared. While files are copied, `archive.partial.json` lists those that are
whole: the same command, started again, does not copy them twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from mambatrain.errors import UserError
from mambatrain.files import explaining_full_disk, fsync_folder, sha256_of
from mambatrain.runs.checkpoint import FileFacts, find_damage, list_checkpoints, make_durable, read_progress, step_of
from mambatrain.runs.folder import RunFolder

ARCHIVE_FILE, PARTIAL_FILE = "archive.json", "archive.partial.json"
_FORMAT, _VERSION = "mambatrain archive", 1
_PIECE_BYTES = 1 << 23

Which = Literal["newest", "best", "all"]


@dataclass
class Copied:
    """What an archiving or a fetching came to."""

    files: list[str] = field(default_factory=list)
    """Those that were copied."""
    num_bytes: int = 0
    num_there: int = 0
    """Files that were whole before."""

    def __str__(self) -> str:
        there = f"; {self.num_there} were there" if self.num_there else ""
        return f"{len(self.files)} files, {self.num_bytes / 1e6:,.1f} MB{there}"


def archive_run(run: RunFolder, target: str, which: Which) -> Copied:
    """Copies a run under a URL; a target that has some of its checkpoints already keeps them.

    Raises:
        UserError: there is no such checkpoint, one is damaged, the target is another run's or a run itself, or cannot
            be written.
    """
    storage, copied = Storage(target), Copied()
    files = [file for checkpoint in choose_checkpoints(run, which) for file in sorted(checkpoint.iterdir())]
    files += [file for file in _own_files(run) if file.is_file()]
    with storage.errors_named():
        lists = [one for one in map(storage.read_list, (PARTIAL_FILE, ARCHIVE_FILE)) if one is not None]
        if not lists and storage.size_of(run.recipe_file.name) is not None:  # this run's own folder, or another's
            raise UserError(f"{target} holds a run, and its files would be written over", "give a target of its own")
        whole = next(filter(None, lists), {})
        recipe = whole.get(run.recipe_file.name)
        if recipe is not None and recipe["sha256"] != sha256_of(run.recipe_file):
            raise UserError(f"{target} holds the archive of another run", "give a target of its own")
        # From here to the end there is no archive, only the beginning of one.
        storage.write_list(PARTIAL_FILE, whole)
        storage.remove(ARCHIVE_FILE)
        for file in files:
            name = file.relative_to(run.path).as_posix()
            facts = _facts_now(file)
            if whole.get(name) == facts and storage.size_of(name) == facts["bytes"]:
                copied.num_there += 1
                continue
            with file.open("rb") as source, storage.open(name, "wb") as sink:
                _copy(source, sink, facts["bytes"])
            with storage.open(name, "rb") as back:
                if _copy(back, None) != facts["sha256"]:
                    raise UserError(f"{target}/{name} is not what was written there", "start the same command again")
            whole[name] = facts
            storage.write_list(PARTIAL_FILE, whole)
            copied.files.append(name)
            copied.num_bytes += facts["bytes"]
        storage.write_list(ARCHIVE_FILE, whole)
        storage.remove(PARTIAL_FILE)
    return copied


def fetch_run(target: str, folder: Path) -> Copied:
    """The inverse: a run folder from an archive, which appears when all of it is there.

    Raises:
        UserError: the folder exists, the archive is not whole, or a file is not what the archive says.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already", "name a folder that does not")
    storage, copied = Storage(target), Copied()
    beside = folder.absolute().with_name(f".{folder.name}.fetching")  # kept when cut short, and gone on with
    with storage.errors_named(), explaining_full_disk(str(folder)):
        files = storage.read_list(ARCHIVE_FILE)
        if not files:
            was_begun = files is not None or storage.read_list(PARTIAL_FILE) is not None
            hint = "start `mambatrain runs archive` again: it was cut short"
            raise UserError(
                f"{target} holds no archive ({ARCHIVE_FILE})",
                hint if was_begun else "name the target of `runs archive`",
            )
        for name, facts in files.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{target}/{ARCHIVE_FILE} names a file outside of the run: {name}", "do not trust it")
            file = beside / name
            if file.is_file() and file.stat().st_size == facts["bytes"] and sha256_of(file) == facts["sha256"]:
                copied.num_there += 1
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            with storage.open(name, "rb") as source, file.open("wb") as sink:
                _copy(source, sink)
            if make_durable(file) != facts:
                raise UserError(
                    f"{target}/{name} was changed: its digest is not the archive's",
                    "remove that file, then archive the run again: what has the size it had there is not copied again",
                )
            copied.files.append(name)
            copied.num_bytes += facts["bytes"]
        for leftover in beside.rglob("*"):  # of a fetching that was cut short, of what was archived then
            if leftover.is_file() and leftover.relative_to(beside).as_posix() not in files:
                leftover.unlink()
        beside.replace(folder)
        fsync_folder(folder.absolute().parent)
    return copied


def choose_checkpoints(run: RunFolder, which: Which) -> list[Path]:
    """The checkpoints that are meant, all of them whole.

    Raises:
        UserError: there are none, or one is damaged.
    """
    checkpoints = list_checkpoints(run.path)
    if not checkpoints:
        raise UserError(f"{run.path} has no checkpoints yet", "archive it when the first is written")
    if which != "all":
        if which == "best":
            _refuse_damaged(checkpoints[-1])  # it knows which is
        step = step_of(checkpoints[-1]) if which == "newest" else read_progress(checkpoints[-1]).best_step
        checkpoints = [checkpoint for checkpoint in checkpoints if step_of(checkpoint) == step]
        if not checkpoints:
            raise UserError(f"{run.path} keeps no best checkpoint", "--checkpoints newest, or all")
    for checkpoint in checkpoints:
        _refuse_damaged(checkpoint)
    return checkpoints


def _refuse_damaged(checkpoint: Path) -> None:
    if (damage := find_damage(checkpoint)) is not None:
        raise UserError(damage, "`mambatrain runs verify` names what is whole")


def _own_files(run: RunFolder) -> list[Path]:
    adapter = sorted(run.adapter.iterdir()) if run.adapter.is_dir() else []
    one_by_one = [run.recipe_file, run.facts_file, run.tokenizer_file, *run.chat_files, run.branch_file, run.log_file]
    return [*one_by_one, run.loss_picture, run.tuned_state, run.stopped_marker, *adapter]


class Storage:
    """The files under a URL.

    Raises:
        UserError: nothing installed reaches it.
    """

    def __init__(self, target: str) -> None:
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations

        self.target = target
        try:
            self._system, self._root = url_to_fs(target)
        except ImportError as error:
            package = known_implementations[target.partition("://")[0]]["class"].partition(".")[0]
            hint = f"pip install {package}" if package != "fsspec" else str(error)
            raise UserError(f"{target} needs a package that is not installed: {error}", hint) from None
        except ValueError as error:
            raise UserError(f"{target} cannot be reached: {error}", "s3://bucket/folder, or a path") from None

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """
        Raises:
            UserError: in place of whatever the storage's own library raises.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{self.target} cannot be used: {told}", "what is whole there is not copied again"
            ) from error

    def open(self, name: str, mode: Literal["rb", "wb"]) -> IO[bytes]:
        path = f"{self._root}/{name}"
        if mode == "wb":
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
        opened: IO[bytes] = self._system.open(path, mode)
        return opened

    def size_of(self, name: str) -> int | None:
        """In bytes; None where there is no such file."""
        path = f"{self._root}/{name}"
        return int(self._system.size(path)) if self._system.exists(path) else None

    def remove(self, name: str) -> None:
        if self.size_of(name) is not None:
            self._system.rm_file(f"{self._root}/{name}")

    def read_list(self, name: str) -> dict[str, FileFacts] | None:
        """The files that an archive lists: None where there is no list, no files where its writing was cut short."""
        if self.size_of(name) is None:
            return None
        try:
            with self.open(name, "rb") as file:
                content: dict[str, Any] = json.loads(file.read())
        except ValueError:
            return {}
        if (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
            raise UserError(f"{self.target}/{name} is no archive of this version", "archive the run elsewhere")
        files: dict[str, FileFacts] = content["files"]
        return files

    def write_list(self, name: str, files: dict[str, FileFacts]) -> None:
        content = {"format": _FORMAT, "version": _VERSION, "files": files}
        with self.open(name, "wb") as file:
            file.write(json.dumps(content, indent=2).encode())


def _facts_now(file: Path) -> FileFacts:
    """Of the bytes that a file has now: a log may grow."""
    num_bytes = file.stat().st_size
    with file.open("rb") as source:
        return {"bytes": num_bytes, "sha256": _copy(source, None, num_bytes)}


def _copy(source: IO[bytes], sink: IO[bytes] | None, num_bytes: int | None = None) -> str:
    """Copies at most so many bytes and gives their SHA-256."""
    digest, left = hashlib.sha256(), num_bytes
    while piece := source.read(_PIECE_BYTES if left is None else min(left, _PIECE_BYTES)):
        digest.update(piece)
        if sink is not None:
            sink.write(piece)
        left = None if left is None else left - len(piece)
    return digest.hexdigest()
