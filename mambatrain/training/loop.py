"""The loop that every kind of training runs: pretraining and fine-tuning differ in data and starting weights alone."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambatrain.adapters.trained import TrainedTensors
from mambatrain.data.held_out_batches import HeldOutBatches
from mambatrain.data.training_order import TrainingOrder
from mambatrain.devices import peak_memory_bytes
from mambatrain.evaluation.held_out import HeldOutLoss, measure_held_out
from mambatrain.files import explaining_full_disk
from mambatrain.runs.checkpoint import Progress, prune_checkpoints, save_checkpoint, save_sharded_checkpoint
from mambatrain.training.guards import (
    find_fault,
    first_draw_not_skipped,
    name_documents,
    name_gradients,
    refuse_endless_skipping,
    take_note,
)
from mambatrain.training.health import health_is_due, write_health
from mambatrain.training.optimizer import Optimizers, optimizer_tensors, set_learning_rate
from mambatrain.training.schedule import learning_rate_at
from mambatrain.training.schedule_free import evaluated_weights
from mambatrain.training.sharding import clip_gradients, is_sharded, reshard, sum_gradients_in_next_backward
from mambatrain.training.stop import StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mambatrain.recipe import Recipe
    from mambatrain.runs.folder import RunFolder
    from mambatrain.training.metrics import RunReporter
    from mambatrain.training.objective import NextTokenLoss


@dataclass
class TrainingRun:
    """Everything the loop works on."""

    recipe: Recipe
    folder: RunFolder
    accelerator: Accelerator
    objective: NextTokenLoss
    """The module itself; its parameters are those of the model, and of an adapter where there is one."""
    prepared: torch.nn.Module
    """The objective as Accelerate wrapped it: autocast, and DDP where there are several processes."""
    trained: TrainedTensors
    """What the optimizers move and checkpoints hold."""
    frozen_sha256: str | None
    """Of the parameters that an adapter leaves as they are; None where the model itself is trained."""
    optimizers: Optimizers
    order: TrainingOrder
    held_out: HeldOutBatches | None
    micro_batch_rows: int
    progress: Progress
    reporter: RunReporter
    flops_per_token: float
    peak_flops: float
    """Of one device."""


@dataclass(frozen=True)
class Draw:
    """What one draw came to, over all ranks."""

    loss: float
    """Nats per counted target."""
    gradient_norm: float
    """Before clipping."""
    num_targets: int
    data_seconds: float
    """Time this rank waited for its rows."""
    stop_asked: bool
    """Whether any rank was asked to stop."""


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
            else:
                progress.skipped_in_a_row += 1
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
    return progress.step < recipe.total_steps or progress.held_out_pending


def pass_over_draws(run: TrainingRun) -> None:
    """Goes on to the next draw that `data.skip_draws` does not name, and says so in the log."""
    progress = run.progress
    first, progress.draw = progress.draw, first_draw_not_skipped(progress.draw, run.recipe.data.skip_draws)
    if progress.draw > first:
        progress.log_lines += 1
        line = {"event": "passed_over", "step": progress.step, "draw": first, "last_draw": progress.draw - 1}
        run.reporter.write_event(line)


def compute_gradients(run: TrainingRun, stop: StopRequest) -> Draw:
    """Forward and backward over this rank's micro-batches; gradients are summed over ranks and clipped.

    The loss is summed over the whole step and divided once by the global number of counted targets, so that it does
    not depend on how the rows were split into ranks and micro-batches.
    """
    accelerator, device = run.accelerator, run.accelerator.device
    started = time.perf_counter()
    micro_batches = run.order.micro_batches(
        run.progress.draw, run.micro_batch_rows, accelerator.process_index, accelerator.num_processes
    )
    data_seconds = time.perf_counter() - started
    own_targets = sum(micro_batch.num_targets for micro_batch in micro_batches)
    num_targets = int(sum_over_ranks(run, torch.tensor([own_targets], dtype=torch.float64))[0])
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for index, micro_batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        sum_gradients_in_next_backward(run.prepared, run.objective.model, wanted=is_last)
        with accelerator.autocast():
            loss = run.prepared(*micro_batch.to(device))
        # Ranks' gradients are averaged; we want the sum, hence the factor.
        (loss * (accelerator.num_processes / max(num_targets, 1))).backward()
        loss_sum += loss.detach()
    gradient_norm = clip_gradients(run.prepared.parameters(), run.recipe.training.clip_norm)
    # One reduction for all that the ranks must agree on.
    total, norm, asked = sum_over_ranks(
        run, torch.tensor([loss_sum.item(), gradient_norm, float(stop.asked)], dtype=torch.float64)
    ).tolist()
    return Draw(
        loss=total / max(num_targets, 1),
        gradient_norm=norm / accelerator.num_processes,
        num_targets=num_targets,
        data_seconds=data_seconds,
        stop_asked=asked > 0,
    )


def evaluate_held_out(run: TrainingRun, stop: StopRequest) -> bool:
    """Measures the held-out loss, writes it to the log, and says whether it is the best so far.

    Where a rank is asked to stop meanwhile, nothing is measured, and `held_out_pending` says that it is still to be.
    """
    if run.held_out is None:
        return False
    accelerator, progress = run.accelerator, run.progress
    share = run.held_out.micro_batches(run.micro_batch_rows, accelerator.process_index, accelerator.num_processes)
    with accelerator.autocast(), evaluated_weights(run.optimizers):
        if not is_sharded(run.objective.model):  # ranks that share a model go through all of it together
            share = takewhile(lambda batch: not stop.asked, share)
        batches = (batch.to(accelerator.device) for batch in share)
        own = measure_held_out(run.objective.model, batches, None, run.objective.first_state())
        reshard(run.objective.model)
    nats, num_targets, asked = sum_over_ranks(
        run, torch.tensor([own.nats, own.num_targets, float(stop.asked)], dtype=torch.float64)
    ).tolist()
    progress.held_out_pending = asked > 0
    if progress.held_out_pending:
        return False
    loss = HeldOutLoss(nats, int(num_targets), run.held_out.num_bytes)
    run.progress.log_lines += 1
    run.reporter.write_held_out(
        {
            "event": "held_out",
            "step": progress.step,
            "draw": progress.draw,
            "tokens_seen": progress.tokens_seen,
            "held_out_loss": finite_or_none(loss.nats_per_token),
            "held_out_bits_per_byte": None if loss.bits_per_byte is None else finite_or_none(loss.bits_per_byte),
            "held_out_tokens": loss.num_targets,
        }
    )
    best = progress.best_held_out_loss
    improved = math.isfinite(loss.nats_per_token) and (best is None or loss.nats_per_token < best)
    if improved and progress.step > 0:
        progress.best_step, progress.best_held_out_loss = progress.step, loss.nats_per_token
    return improved


def save(run: TrainingRun) -> None:
    """Writes a checkpoint while all ranks wait, and removes those the recipe does not keep.

    Sharded, every rank writes what it has; else rank 0 does.
    """
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
    run.accelerator.wait_for_everyone()


def write_draw(
    run: TrainingRun, draw: Draw, fault: str | None, blamed: list[str], learning_rate: float, seconds: float
) -> None:
    """The draw's JSON line. Skipped draws have no loss in it: NaN is not JSON."""
    progress = run.progress
    tokens_per_second = draw.num_targets / seconds
    line: dict[str, Any] = {
        "event": "step" if fault is None else "skipped",
        "step": progress.step,
        "draw": progress.draw - 1,
        "tokens_seen": progress.tokens_seen,
        "loss": draw.loss if fault is None else None,
        "gradient_norm": draw.gradient_norm if fault is None else None,
        "learning_rate": learning_rate,
        "num_targets": draw.num_targets,
        "tokens_per_second": tokens_per_second,
        "model_flops_utilisation": tokens_per_second
        * run.flops_per_token
        / (run.peak_flops * run.accelerator.num_processes),
        "seconds": seconds,
        "data_seconds": draw.data_seconds,
        "memory_bytes": peak_memory_bytes(run.accelerator.device),
    }
    if len(run.order.names) > 1:
        line["source_epochs"] = run.order.drawn_until(progress.draw)
        line["source_rows"] = run.order.rows_by_source(progress.draw - 1)
    if fault is not None:
        line["reason"], line["gradients"] = fault, blamed
        line["documents"] = name_documents(run.order, [progress.draw - 1])
        run.reporter.say(f"draw {progress.draw - 1} was skipped: {fault}")
    progress.log_lines += 1
    run.reporter.write_step(line, run.recipe.training.log_every_steps)


def finite_or_none(value: float) -> float | None:
    """NaN and infinity are not JSON."""
    return value if math.isfinite(value) else None


def is_due(interval: int, run: TrainingRun) -> bool:
    """Whether something that happens every `interval` steps, and at the last one, happens now."""
    return run.progress.step % interval == 0 or run.progress.step == run.recipe.total_steps


def sum_over_ranks(run: TrainingRun, values: Tensor) -> Tensor:
    """Sums a small fp64 tensor over ranks; the same bits on each."""
    if run.accelerator.num_processes == 1:
        return values
    summed: Tensor = run.accelerator.reduce(values.to(run.accelerator.device), "sum")
    return summed
