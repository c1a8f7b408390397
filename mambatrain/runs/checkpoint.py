"""Checkpoints: everything to resume, written whole, checked before it is trusted, free of code.

    step-00000100/*.safetensors    parameters and optimizer: checkpoint_tensors.py
    step-00000100/progress.json    step, draw, counts, lines of the log
    step-00000100/manifest.json    size and SHA-256 of the other files; written last

A checkpoint is written under a temporary name and renamed when all of it is on the disk.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mambatrain.errors import UserError
from mambatrain.files import explaining_full_disk, fsync_file, fsync_folder, sha256_of, write_json_whole
from mambatrain.runs.checkpoint_tensors import missing_kind, write_shards, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from mambatrain.recipe import CheckpointSection

PROGRESS_FILE = "progress.json"
MANIFEST_FILE = "manifest.json"
_WRITING = ".writing-"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Running:
    """What some number has been over the last applied draws."""

    count: int = 0
    """Draws it stands for; at most `guards.memory_draws`."""
    mean: float = 0.0
    variance: float = 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        return math.sqrt(self.variance)


@dataclass
class Progress:
    """How far a run is. `draw` decides the data, `step` the schedule; a skipped draw moves the first alone."""

    step: int = 0
    """Applied updates."""
    draw: int = 0
    """Batches drawn."""
    tokens_seen: int = 0
    """Counted targets of applied updates."""
    skipped_in_a_row: int = 0
    """Draws that were not applied since the last one that was."""
    best_step: int | None = None
    """Step with the lowest held-out loss so far."""
    best_held_out_loss: float | None = None
    """That loss, in nats per token."""
    log_lines: int = 0
    """Lines of log.jsonl that belong to this point."""
    held_out_pending: bool = False
    """Whether a held-out evaluation of this point was due and was cut short by a request to stop."""
    running: dict[str, Running] = field(default_factory=dict)
    """Of the loss and the gradient norm of applied draws: what a draw is judged by."""


def save_checkpoint(
    checkpoints: Path, progress: Progress, model: dict[str, Tensor], optimizer: dict[str, Tensor]
) -> Path:
    """Writes a checkpoint and returns its folder.

    Args:
        checkpoints: the run's folder of checkpoints.
        progress: where the run is.
        model: parameters by name.
        optimizer: optimizer tensors by `PARAMETER.FIELD`.

    Raises:
        UserError: the disk is full; earlier checkpoints are untouched.
    """
    with _writing(checkpoints, progress) as temporary:
        write_whole(temporary, model, optimizer)
    return checkpoints / temporary.name.removeprefix(_WRITING)


def save_sharded_checkpoint(checkpoints: Path, progress: Progress, tensors: dict[str, Tensor]) -> None:
    """The same by all ranks together, each with its shards; rank 0 makes the folder and ends it.

    Args:
        checkpoints: the run's folder of checkpoints, on a disk that all ranks see.
        progress: where the run is.
        tensors: parameters by name, optimizer tensors by `PARAMETER.FIELD`; sharded (DTensor) or the same on all ranks.

    Raises:
        UserError: the disk is full; earlier checkpoints are untouched.
    """
    from torch.distributed import barrier, get_rank

    temporary = checkpoints / f"{_WRITING}step-{progress.step:08d}"
    with _writing(checkpoints, progress) if get_rank() == 0 else explaining_full_disk(str(temporary)):
        barrier()  # the folder is there
        write_shards(temporary, tensors)
    barrier()  # it has its name


@contextmanager
def _writing(checkpoints: Path, progress: Progress) -> Iterator[Path]:
    """A folder under another name, which is made durable and gets its own when the block has filled it."""
    folder = checkpoints / f"step-{progress.step:08d}"
    temporary = checkpoints / f"{_WRITING}{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with explaining_full_disk(f"checkpoint {folder}"):
            temporary.mkdir(parents=True)
            yield temporary
            write_json_whole(temporary / PROGRESS_FILE, asdict(progress))
            for file in temporary.glob("*.safetensors"):
                fsync_file(file)
            write_json_whole(temporary / MANIFEST_FILE, _manifest_of(temporary))
            fsync_folder(temporary)
            if folder.exists():  # the same step again, after a resume from an earlier one
                shutil.rmtree(folder)
            temporary.replace(folder)
            fsync_folder(checkpoints)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
            doomed = checkpoint.with_name(f".removing-{checkpoint.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            checkpoint.replace(doomed)
            shutil.rmtree(doomed)
    for leftover in (run / "checkpoints").glob(".removing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _manifest_of(folder: Path) -> dict[str, object]:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}
    return {"format": "mambatrain checkpoint", "version": 1, "files": files}
