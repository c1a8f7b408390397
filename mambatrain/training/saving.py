"""Checkpoints between two steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from mambatrain.runs.checkpoint import prune_checkpoints, save_checkpoint
from mambatrain.runs.checkpoint_tensors import EXTRA, own_parts
from mambatrain.runs.sharded_checkpoint import Ranks, save_sharded_checkpoint
from mambatrain.training.carried import tensors_by_slot, whole_tensors
from mambatrain.training.optimizer import optimizer_tensors
from mambatrain.training.schedule_free import evaluated_weights
from mambatrain.training.sharding import is_sharded
from mambatrain.training.training_run import TrainingRun


def save(run: TrainingRun) -> None:
    """Writes a checkpoint and removes those the recipe does not keep, while all ranks wait or in the background.

    Sharded, every rank writes what it has; else rank 0 does. In the background only a copy of that holds training up:
    the thread that writes reads nothing that training changes, and takes part in no collective.

    Raises:
        UserError: the disk is full, for this save or for the one before it.
    """
    run.watch.at("saving", run.progress.draw)
    if run.background.is_writing and not run.background.was_waited_for:
        run.background.was_waited_for = True
        run.reporter.say("the checkpoint before is still being written: training waits for it (said once)")
    run.background.finish()
    in_background = saves_in_background(run)
    with evaluated_weights(run.optimizers):
        model = {name: value.detach() for name, value in run.trained.parameters.items()}
        states = optimizer_tensors(run.optimizers, run.trained)
        hold = run.background.copy if in_background else dict
        write = _sharded_save if is_sharded(run.objective.model) else _whole_save
        if not in_background:
            write(run, model, states, hold)()
        else:
            write_later = write(run, model, states, hold)  # every rank: carried states are brought together
            if write is _sharded_save or run.accelerator.is_main_process:
                run.background.start(write_later)
    if not in_background:
        run.watch.meet("waiting for the checkpoint", run.progress.draw)
        run.accelerator.wait_for_everyone()


def saves_in_background(run: TrainingRun) -> bool:
    """`checkpoint.asynchronous`; auto: on a GPU, whose memory the copy is not in."""
    asked = run.recipe.checkpoint.asynchronous
    return run.accelerator.device.type == "cuda" if asked == "auto" else asked


Hold = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""What is written in place of tensors: a copy, or they themselves."""


def _whole_save(
    run: TrainingRun, model: dict[str, Tensor], states: dict[str, Tensor], hold: Hold
) -> Callable[[], None]:
    carried = whole_tensors(tensors_by_slot(run.carried))
    if not run.accelerator.is_main_process:
        return lambda: None
    progress = copy.deepcopy(run.progress)
    held_model, held_states, held_carried = hold(model), hold(states), hold(carried)

    def write() -> None:
        save_checkpoint(run.folder.checkpoints, progress, held_model, held_states, held_carried, run.folder.log_file)
        prune_checkpoints(run.folder.path, run.recipe.checkpoint, progress.best_step)

    return write


def _sharded_save(
    run: TrainingRun, model: dict[str, Tensor], states: dict[str, Tensor], hold: Hold
) -> Callable[[], None]:
    carried = {f"{EXTRA}{name}": tensor for name, tensor in tensors_by_slot(run.carried).items()}
    progress, parts, ranks = copy.deepcopy(run.progress), own_parts(model | states | carried), Ranks.of_this_run()
    held = hold({name: part.tensor for name, part in parts.items()})
    parts = {name: replace(part, tensor=held[name]) for name, part in parts.items()}

    def write() -> None:
        save_sharded_checkpoint(run.folder.checkpoints, progress, parts, ranks, log=run.folder.log_file)
        if ranks.rank == 0:
            prune_checkpoints(run.folder.path, run.recipe.checkpoint, progress.best_step)

    return write
