"""A run that goes on from another one's checkpoint: its own folder, the same past, another future.

A branch begins with the weights, the optimizer, the counters and the lines of the log of the checkpoint that it
branches from. So its order of data goes on as that of the first run would have; the schedule, the length of the
training and what is kept may be others.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from mambatrain.errors import UserError
from mambatrain.files import explaining_full_disk, fsync_folder, sha256_of, write_json_whole, write_text_whole
from mambatrain.recipe import Recipe, differing_settings, read_recipe, write_recipe
from mambatrain.runs.checkpoint import MANIFEST_FILE, find_damage, list_checkpoints, read_progress, step_of
from mambatrain.runs.folder import RunFolder, read_log

# What a branch may have otherwise: nothing of it changes what was trained before, which tokens come next, or what the
# optimizer's state means. Settings that end in a point stand for all that they hold.
MAY_DIFFER = (
    "schedule.",
    "checkpoint.",
    "guards.",
    "evaluation.every_steps",
    "optimizer.learning_rate",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.eps",
    "optimizer.weight_decay",
    "training.total_steps",
    "training.total_tokens",
    "training.activation_checkpointing",
    "training.segment_tokens",
    "training.clip_norm",
    "training.log_every_steps",
)
# But not where the average that schedule_free keeps is what this number makes of its other weights.
_OF_AVERAGE = "optimizer.beta1"


@dataclass(frozen=True)
class Branching:
    """RUN/branched_from.json."""

    checkpoint: str
    """Its folder, absolute."""
    manifest_sha256: str
    """Of its manifest, which holds the digests of all other files."""
    step: int
    draw: int
    changed: list[str]
    """`path: value -> value` of every setting that is another from there on."""


def run_of(checkpoint: Path) -> RunFolder:
    """The run that a checkpoint belongs to.

    Raises:
        UserError: it is no checkpoint in a run folder.
    """
    run = RunFolder(checkpoint.absolute().parent.parent)
    if run.exists() and checkpoint.absolute().parent == run.checkpoints.absolute():
        step_of(checkpoint)
        return run
    inside = list_checkpoints(checkpoint)
    hint = f"name one of its checkpoints, for example {inside[-1]}" if inside else "name RUN/checkpoints/step-..."
    raise UserError(f"{checkpoint} is not a checkpoint of a run", hint)


def refuse_branch(checkpoint: Path, recipe: Recipe) -> None:
    """
    Raises:
        UserError: the checkpoint is not whole, or the recipe would give its past or its counters another meaning.
    """
    origin = run_of(checkpoint)
    if (damage := find_damage(checkpoint)) is not None:
        raise UserError(f"{checkpoint} is not whole: {damage}", f"`mambatrain runs verify {origin.path}` names others")
    before = read_recipe(str(origin.recipe_file))
    differing = differing_settings(before, recipe)
    may_differ = tuple(path for path in MAY_DIFFER if before.optimizer.kind != "schedule_free" or path != _OF_AVERAGE)
    refused = [line for line in differing if not line.startswith(may_differ)]
    if _skipped_before(read_progress(checkpoint).draw, before) == _skipped_before(
        read_progress(checkpoint).draw, recipe
    ):
        refused = [line for line in refused if not line.startswith("data.skip_draws:")]
    if refused:
        raise UserError(
            f"a branch of {checkpoint} cannot change what its past or its next data mean:\n"
            + "\n".join(f"  {line}" for line in refused),
            "change schedule, length, rates and what is kept; for the rest start a run: "
            f"mambatrain finetune RECIPE --from {origin.path}",
        )
    if recipe.total_steps <= step_of(checkpoint):
        raise UserError(
            f"the branch would end at step {recipe.total_steps:,}, and begins at step {step_of(checkpoint):,}",
            "--set training.total_steps (or total_tokens) counts from the first run's beginning: set it higher",
        )


def _skipped_before(draw: int, recipe: Recipe) -> set[int]:
    return {n for first, last in recipe.data.skip_draws for n in range(first, min(last + 1, draw))}


def refuse_other_branch(checkpoint: Path, folder: RunFolder) -> None:
    """
    Raises:
        UserError: the folder holds a run that did not branch from this checkpoint.
    """
    if folder.path.resolve() == run_of(checkpoint).path.resolve():
        raise UserError(f"{folder.path} is the run that {checkpoint} belongs to", "give the branch a --run of its own")
    if not (list_checkpoints(folder.path) or read_log(folder.log_file) or folder.branch_file.exists()):
        return
    came_from = read_branching(folder)
    if came_from is None or Path(came_from.checkpoint) != checkpoint.resolve():
        said = "begun for itself" if came_from is None else f"branched from {came_from.checkpoint}"
        raise UserError(f"{folder.path} holds a run that was {said}", "give another --run folder, or --fresh")


def read_branching(folder: RunFolder) -> Branching | None:
    """Where a run branched; None of one that has a beginning of its own.

    Raises:
        UserError: its file says something else.
    """
    try:
        return Branching(**json.loads(folder.branch_file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder.branch_file} cannot be read: {error}", "restore it") from None


def begin_branch(checkpoint: Path, recipe: Recipe, folder: RunFolder) -> Path:
    """Makes the folder a run at the checkpoint's moment; killed on the way, the same call begins again.

    Returns:
        The branch's own copy of the checkpoint (links to the same bytes, where the file system has them).

    Raises:
        UserError: the disk is full, or the first run's log is shorter than its checkpoint says.
    """
    origin, progress = run_of(checkpoint), read_progress(checkpoint)
    changed = differing_settings(read_recipe(str(origin.recipe_file)), recipe)
    manifest = sha256_of(checkpoint / MANIFEST_FILE)
    branching = Branching(str(checkpoint.resolve()), manifest, progress.step, progress.draw, changed)
    facts = json.loads(origin.facts_file.read_text(encoding="utf-8"))
    past = origin.log_file.read_bytes().splitlines(keepends=True)[: progress.log_lines]
    if len(past) < progress.log_lines:
        raise UserError(
            f"{origin.log_file} has {len(past)} lines where {checkpoint} counts {progress.log_lines}", "restore the log"
        )
    with explaining_full_disk(f"run folder {folder.path}"):
        write_text_whole(folder.recipe_file, write_recipe(recipe))  # first: it says that the other files are a run's
        write_json_whole(folder.branch_file, asdict(branching))
        write_json_whole(folder.facts_file, facts | {"started_from": None})
        for file in (origin.tokenizer_file, *origin.chat_files):
            if file.exists():
                write_text_whole(folder.path / file.name, file.read_text(encoding="utf-8"))
        write_text_whole(folder.log_file, b"".join(past).decode())
        return _link_whole(checkpoint, folder.checkpoints)


def _link_whole(checkpoint: Path, into: Path) -> Path:
    temporary, final = into / f".writing-{checkpoint.name}", into / checkpoint.name
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file in checkpoint.iterdir():
        try:
            os.link(file, temporary / file.name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, temporary / file.name)
            with (temporary / file.name).open("rb") as copy:
                os.fsync(copy.fileno())
    fsync_folder(temporary)
    temporary.replace(final)
    fsync_folder(into)
    return final
