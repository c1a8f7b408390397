"""Starting, resuming and ending a run in its folder."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from mambatrain.errors import UserError
from mambatrain.launch import EXIT_STOPPED, rank_of_process
from mambatrain.recipe import Recipe, differing_settings, read_recipe, write_recipe
from mambatrain.report.loss_picture import draw_loss
from mambatrain.runs.checkpoint import newest_valid_checkpoint, read_progress
from mambatrain.runs.files import explaining_full_disk, write_text_whole
from mambatrain.runs.folder import RunFolder, cut_log, read_log
from mambatrain.runs.weights import Weights
from mambatrain.training.assemble import Where, assemble, start_processes
from mambatrain.training.loop import train
from mambatrain.training.metrics import print_fact

Resume = Literal["if-possible", "required", "fresh"]


def run_training(recipe: Recipe, path: Path, where: Where, resume: Resume, weights: Weights | None = None) -> int:
    """Trains a recipe in a run folder, from where the folder's newest whole checkpoint left off.

    Args:
        recipe: what is trained.
        path: the run folder; made where it does not exist.
        where: device, kernels, tracker.
        resume: `if-possible` continues a run of the same recipe, `required` refuses to begin, `fresh` moves what
            is there aside and begins.
        weights: what a new run starts from; None is the initialisation.

    Returns:
        0 when the last step is done, 75 when the run was asked to stop before.

    Raises:
        UserError: the folder holds another recipe's run or is in use, or something does not fit.
    """
    folder = RunFolder(path)
    is_main = rank_of_process() == 0
    with folder.locked() if is_main else nullcontext():
        fresh = resume == "fresh" or newest_valid_checkpoint(path) is None
        if is_main:
            if resume == "fresh":
                _move_aside(folder)
            refuse_other_recipe(recipe, folder)
        accelerator, resolved = start_processes(recipe, folder, where, fresh)
        checkpoint = None if fresh else _find_checkpoint(folder, is_main)
        if checkpoint is None and resume == "required":
            raise UserError(f"{path} holds no whole checkpoint to resume from", "leave --resume out to begin a new run")
        if is_main:
            _prepare_folder(recipe, folder, checkpoint)
        accelerator.wait_for_everyone()
        run = assemble(recipe, folder, where, accelerator, resolved, checkpoint, weights)
        try:
            if run.progress.step >= recipe.total_steps:
                run.reporter.say(f"{path} is finished: {run.progress.step:,} steps are done")
                stopped = False
            else:
                stopped = train(run)
        finally:
            run.reporter.close()
        if is_main:
            _conclude(run.recipe, folder, stopped)
        accelerator.wait_for_everyone()
    return EXIT_STOPPED if stopped else 0


def refuse_other_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """
    Raises:
        UserError: the folder holds a run of another recipe; the keys that differ are named.
    """
    if not folder.exists():
        return
    differing = differing_settings(read_recipe(str(folder.recipe_file)), recipe)
    if differing:
        raise UserError(
            f"{folder.path} holds a run of another recipe:\n" + "\n".join(f"  {line}" for line in differing),
            "give another --run folder, or --fresh to move this run aside and begin again",
        )


def _find_checkpoint(folder: RunFolder, is_main: bool) -> Path | None:
    damaged: list[str] = []
    checkpoint = newest_valid_checkpoint(folder.path, damaged)
    if is_main:
        for damage in damaged:
            print_fact("warning", f"{damage}; an older checkpoint is used")
    return checkpoint


def _prepare_folder(recipe: Recipe, folder: RunFolder, checkpoint: Path | None) -> None:
    """Brings the folder to the moment of the checkpoint, or to the beginning."""
    with explaining_full_disk(f"run folder {folder.path}"):
        folder.stopped_marker.unlink(missing_ok=True)
        cut_log(folder.log_file, 0 if checkpoint is None else read_progress(checkpoint).log_lines)
        tokenizer = Path(recipe.data.shards) / "tokenizer.json"
        if tokenizer.is_file() and not folder.tokenizer_file.exists():
            shutil.copyfile(tokenizer, folder.tokenizer_file)
        write_text_whole(folder.recipe_file, write_recipe(recipe))


def _conclude(recipe: Recipe, folder: RunFolder, stopped: bool) -> None:
    """The picture, the marker and the last words."""
    if draw_loss(read_log(folder.log_file), folder.loss_picture, f"{folder.path.name}: {recipe.model.block}"):
        print_fact("picture", str(folder.loss_picture))
    checkpoint = newest_valid_checkpoint(folder.path)
    if checkpoint is not None:
        print_fact("checkpoint", str(checkpoint))
    if stopped:
        write_text_whole(folder.stopped_marker, "asked to stop; the same command continues\n")
        print_fact("stopped", "the same command continues from here")


def _move_aside(folder: RunFolder) -> None:
    """Renames what a --fresh run would replace: nothing is deleted."""
    for number in range(1, 10_000):
        aside = folder.path / f"before-{number}"
        if not aside.exists():
            break
    old = [path for path in folder.path.iterdir() if path.name != ".lock" and not path.name.startswith("before-")]
    if old:
        aside.mkdir()
        for path in old:
            path.replace(aside / path.name)
        print_fact("moved", f"the earlier run to {aside}")
