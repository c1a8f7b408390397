"""The loop that every kind of training runs: pretraining and fine-tuning differ in data and starting weights alone."""

from __future__ import annotations

import time

from mambatrain.files import explaining_full_disk
from mambatrain.training.carried import forget_begun
from mambatrain.training.gradients import compute_gradients
from mambatrain.training.guards import (
    find_fault,
    first_draw_not_skipped,
    name_gradients,
    refuse_endless_skipping,
    take_note,
)
from mambatrain.training.health import health_is_due, write_health
from mambatrain.training.measuring import evaluate_held_out
from mambatrain.training.optimizer import set_learning_rate
from mambatrain.training.saving import save
from mambatrain.training.schedule import learning_rate_at
from mambatrain.training.step_log import write_draw
from mambatrain.training.stop import StopRequest
from mambatrain.training.training_run import TrainingRun


def train(run: TrainingRun, stop: StopRequest) -> bool:
    """Trains to the recipe's last step, or to the end of the draw in which a stop was asked for.

    Returns:
        True where the run was asked to stop before; a checkpoint is written either way.

    Raises:
        UserError: too many draws in a row could not be applied, or the disk is full.
    """
    recipe, progress = run.recipe, run.progress
    with explaining_full_disk(f"the log of {run.folder.path}"):
        if progress.draw == 0:
            evaluate_held_out(run, stop)
        elif progress.held_out_pending:  # an earlier life was asked to stop in the middle of it
            evaluate_held_out(run, stop)
            save(run)
        saved_step = progress.step if progress.draw else -1
        while progress.step < recipe.total_steps and not progress.held_out_pending:
            started = time.perf_counter()
            pass_over_draws(run)
            learning_rate = learning_rate_at(progress.step, recipe)
            set_learning_rate(run.optimizers, learning_rate)
            draw = compute_gradients(run, stop)
            fault = find_fault(draw.loss, draw.gradient_norm, draw.num_targets, progress.running, recipe.guards)
            if fault is None and not draw.states_are_finite:
                fault = "a state that the next rows would go on from is not finite"
            blamed = [] if fault is None else name_gradients(run.objective.model)
            if fault is None:
                run.trained.refuse_no_gradient()
                if health_is_due(run):
                    write_health(run, draw)
                for optimizer in run.optimizers:
                    optimizer.step()
                progress.step += 1
                progress.tokens_seen += draw.num_targets
                progress.skipped_in_a_row = 0
                take_note(progress.running, draw.loss, draw.gradient_norm, recipe.guards)
                run.carried = draw.behind
            else:
                progress.skipped_in_a_row += 1
                forget_begun(run, progress.draw, progress.draw + 1)
            run.prepared.zero_grad(set_to_none=True)
            progress.draw += 1
            write_draw(run, draw, fault, blamed, learning_rate, time.perf_counter() - started)
            if fault is not None:
                refuse_endless_skipping(
                    progress.skipped_in_a_row, progress.draw - 1, fault, blamed, run.order, recipe.guards
                )
            improved = fault is None and is_due(recipe.evaluation.every_steps, run) and evaluate_held_out(run, stop)
            save_is_due = fault is None and is_due(recipe.checkpoint.every_steps, run)
            if save_is_due or (improved and recipe.checkpoint.keep_best):
                save(run)
                saved_step = progress.step
            if draw.stop_asked:
                break
        if saved_step != progress.step:
            save(run)
        run.watch.at("waiting for the checkpoint in the background", progress.draw)
        run.background.finish()
    return progress.step < recipe.total_steps or progress.held_out_pending


def pass_over_draws(run: TrainingRun) -> None:
    """Goes on to the next draw that `data.skip_draws` does not name, and says so in the log."""
    progress = run.progress
    first, progress.draw = progress.draw, first_draw_not_skipped(progress.draw, run.recipe.data.skip_draws)
    if progress.draw > first:
        forget_begun(run, first, progress.draw)
        progress.log_lines += 1
        line = {"event": "passed_over", "step": progress.step, "draw": first, "last_draw": progress.draw - 1}
        run.reporter.write_event(line)


def is_due(interval: int, run: TrainingRun) -> bool:
    """Whether something that happens every `interval` steps, and at the last one, happens now."""
    return run.progress.step % interval == 0 or run.progress.step == run.recipe.total_steps
