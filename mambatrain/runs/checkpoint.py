"""Checkpoints: everything to resume, written whole, checked before it is trusted, free of code.

    step-00000100/*.safetensors    parameters and optimizer: checkpoint_tensors.py
    step-00000100/progress.json    step, draw, counts, lines of the log
    step-00000100/manifest.json    size and SHA-256 of the other files; written last

A checkpoint is written under a temporary name and renamed when all of it is on the disk.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from mambatrain.errors import UserError
from mambatrain.files import explaining_full_disk, fsync_file, fsync_folder, sha256_of, write_json_whole
from mambatrain.runs.checkpoint_tensors import missing_kind, write_whole
from mambatrain.runs.progress import Progress, Running

if TYPE_CHECKING:
    from torch import Tensor

    from mambatrain.recipe import CheckpointSection

PROGRESS_FILE = "progress.json"
MANIFEST_FILE = "manifest.json"
_FORMAT, _VERSION = "mambatrain checkpoint", 1
_WRITING = ".writing-"
_REMOVING = ".removing-"
_NAME = re.compile(r"step-(\d{8,})")


class FileFacts(TypedDict):
    """An entry of the manifest."""

    bytes: int
    sha256: str


def save_checkpoint(
    checkpoints: Path,
    progress: Progress,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    extra: dict[str, Tensor] | None = None,
    log: Path | None = None,
) -> Path:
    """Writes a checkpoint and returns its folder.

    Args:
        checkpoints: the run's folder of checkpoints.
        progress: where the run is.
        model: parameters by name.
        optimizer: optimizer tensors by `PARAMETER.FIELD`.
        extra: what else is needed to go on, by name.
        log: the file whose lines `progress` counts.

    Raises:
        UserError: the disk is full; earlier checkpoints are untouched.
    """
    with writing_checkpoint(checkpoints, progress, log) as (temporary, durable):
        for file in write_whole(temporary, model, optimizer, extra or {}):
            durable[file.name] = make_durable(file)
    return checkpoints / temporary.name.removeprefix(_WRITING)


@contextmanager
def writing_checkpoint(
    checkpoints: Path, progress: Progress, log: Path | None
) -> Iterator[tuple[Path, dict[str, FileFacts]]]:
    """A folder under another name, which gets its own when the block has filled it.

    The block writes files and puts into the dictionary what `make_durable` says of each, by name.
    """
    folder = checkpoints / f"step-{progress.step:08d}"
    temporary = checkpoints / f"{_WRITING}{folder.name}"
    try:
        with explaining_full_disk(f"checkpoint {folder}"):
            for leftover in checkpoints.glob(f"{_WRITING}*"):  # of a life that was killed in the middle of one
                shutil.rmtree(leftover)
            if log is not None:
                fsync_file(log)  # a checkpoint that counts its lines must not outlive them
            temporary.mkdir(parents=True)
            durable: dict[str, FileFacts] = {}
            yield temporary, durable
            write_json_whole(temporary / PROGRESS_FILE, asdict(progress))
            durable[PROGRESS_FILE] = make_durable(temporary / PROGRESS_FILE)
            files = dict(sorted(durable.items()))
            manifest = {"format": _FORMAT, "version": _VERSION, "files": files}
            write_json_whole(temporary / MANIFEST_FILE, manifest)
            _publish(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def make_durable(file: Path) -> FileFacts:
    """Waits until a file is on the disk; its size and digest are the manifest's entry."""
    fsync_file(file)
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _publish(temporary: Path, folder: Path) -> None:
    fsync_folder(temporary)
    replaced = folder.with_name(f"{_REMOVING}{folder.name}")
    if folder.exists():  # the same step again, after a resume
        shutil.rmtree(replaced, ignore_errors=True)
        folder.replace(replaced)
    temporary.replace(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def put_back_replaced(run: Path) -> None:
    """Behind a life that was killed between the two renames of `_publish`: neither folder has the checkpoint's name."""
    for replaced in (run / "checkpoints").glob(f"{_REMOVING}*"):
        folder = replaced.with_name(replaced.name.removeprefix(_REMOVING))
        if folder.with_name(f"{_WRITING}{folder.name}").is_dir() and not folder.exists():
            replaced.replace(folder)


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first; unfinished ones have another name."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise UserError(f"{checkpoint} is not a checkpoint", "checkpoints are folders named like step-00000100")
    return int(match.group(1))


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None: every file has the size and digest of the manifest."""
    return next(damages_of(checkpoint), None)


def damages_of(checkpoint: Path) -> Iterator[str]:
    """A sentence for each file of a checkpoint that is not as the manifest says; files are read as they are asked for.

    What the manifest does not tell is left out: behind a manifest that is missing or unreadable nothing follows.
    """
    manifest_file = checkpoint / MANIFEST_FILE
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        if (manifest["format"], manifest["version"]) != (_FORMAT, _VERSION):
            raise ValueError
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except OSError:
        yield f"{manifest_file} is missing"
        return
    except (ValueError, KeyError, TypeError, AttributeError):
        yield f"{manifest_file} is not readable"
        return
    for required in (missing_kind(set(expected)), None if PROGRESS_FILE in expected else PROGRESS_FILE):
        if required is not None:
            yield f"{manifest_file} does not list {required}"
    for name, (num_bytes, digest) in expected.items():
        file = checkpoint / name
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != num_bytes:
            yield f"{file} has {file.stat().st_size:,} bytes where the manifest says {num_bytes:,}"
        elif sha256_of(file) != digest:
            yield f"{file} was changed: its digest is not the manifest's"


def checkpoint_to_resume(run: Path, damaged: list[str]) -> Path | None:
    """The newest whole checkpoint, None where a run has none yet; what is wrong with newer ones goes into `damaged`.

    Raises:
        UserError: there are checkpoints and none is whole: to begin again is the user's to say.
    """
    checkpoint = newest_valid_checkpoint(run, damaged)
    if checkpoint is None and damaged:
        raise UserError(
            f"no checkpoint of {run} is whole:\n" + "\n".join(f"  {damage}" for damage in damaged),
            "restore one of them, or --fresh to move this run aside and begin again",
        )
    return checkpoint


def set_newer_aside(run: Path, checkpoint: Path) -> None:
    """Renames the damaged checkpoints above the one that is resumed from: they are no longer the newest."""
    for newer in list_checkpoints(run):
        if step_of(newer) > step_of(checkpoint):
            aside = newer.with_name(f"damaged-{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newer.replace(aside)


def newest_valid_checkpoint(run: Path, damaged: list[str] | None = None) -> Path | None:
    """The newest checkpoint whose files are all whole, or None; what is wrong with newer ones goes into `damaged`."""
    for checkpoint in reversed(list_checkpoints(run)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        if damaged is not None:
            damaged.append(damage)
    return None


def read_progress(checkpoint: Path) -> Progress:
    """Where the run was."""
    read = json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
    return Progress(**read | {"running": {what: Running(**values) for what, values in read.get("running", {}).items()}})


def prune_checkpoints(run: Path, keep: CheckpointSection, best_step: int | None) -> None:
    """Removes those that the recipe does not keep; a removal that is cut short leaves no checkpoint's name."""
    for checkpoint in list_checkpoints(run)[: -keep.keep_newest]:
        step = step_of(checkpoint)
        for_ever = keep.keep_every is not None and step % (keep.keep_every * keep.every_steps) == 0
        if not (for_ever or (keep.keep_best and step == best_step)):
            doomed = checkpoint.with_name(f"{_REMOVING}{checkpoint.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            checkpoint.replace(doomed)
            shutil.rmtree(doomed)
    for leftover in (run / "checkpoints").glob(f"{_REMOVING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
