"""Checkpoints between two steps."""

from __future__ import annotations

from mambatrain.runs.checkpoint import prune_checkpoints, save_checkpoint, save_sharded_checkpoint
from mambatrain.training.optimizer import optimizer_tensors
from mambatrain.training.schedule_free import evaluated_weights
from mambatrain.training.sharding import is_sharded
from mambatrain.training.training_run import TrainingRun


def save(run: TrainingRun) -> None:
    """Writes a checkpoint while all ranks wait, and removes those the recipe does not keep.

    Sharded, every rank writes what it has; else rank 0 does.
    """
    run.watch.at("saving", run.progress.draw)
    if run.accelerator.is_main_process:
        run.reporter.sync()
    with evaluated_weights(run.optimizers):
        trained = {name: value.detach() for name, value in run.trained.parameters.items()}
        states = optimizer_tensors(run.optimizers, run.trained)
        if is_sharded(run.objective.model):
            save_sharded_checkpoint(run.folder.checkpoints, run.progress, trained | states)
        elif run.accelerator.is_main_process:
            save_checkpoint(run.folder.checkpoints, run.progress, trained, states)
    if run.accelerator.is_main_process:
        prune_checkpoints(run.folder.path, run.recipe.checkpoint, run.progress.best_step)
    run.watch.meet("waiting for the checkpoint", run.progress.draw)
    run.accelerator.wait_for_everyone()
