"""The held-out loss between two steps."""

from __future__ import annotations

import math
from itertools import takewhile

import torch

from mambatrain.data.batches import MicroBatch
from mambatrain.evaluation.held_out import HeldOutLoss, measure_held_out
from mambatrain.training.preference_loss import PreferenceLoss
from mambatrain.training.schedule_free import evaluated_weights
from mambatrain.training.sharding import is_sharded, reshard
from mambatrain.training.step_log import finite_or_none
from mambatrain.training.stop import StopRequest
from mambatrain.training.training_run import TrainingRun, sum_over_ranks


def evaluate_held_out(run: TrainingRun, stop: StopRequest) -> bool:
    """Measures the held-out loss, writes it to the log, and says whether it is the best so far.

    Where a rank is asked to stop meanwhile, nothing is measured, and `held_out_pending` says that it is still to be.
    """
    if run.held_out is None:
        return False
    accelerator, progress, share = run.accelerator, run.progress, run.row_share
    rows = run.held_out.micro_batches(run.micro_batch_rows, share.group, share.num_groups)
    with accelerator.autocast(), evaluated_weights(run.optimizers):
        # Ranks that share a model, or rows, go through all of it together.
        if not is_sharded(run.objective.model) and share.num_parts == 1:
            rows = takewhile(lambda batch: not stop.asked, rows)
        batches = (_noted(run, batch.part(share.part, share.num_parts)).to(accelerator.device) for batch in rows)
        if isinstance(run.objective, PreferenceLoss):
            own = run.objective.measure(batches)
        else:
            found = measure_held_out(run.objective.model, batches, None, run.objective.first_state())
            own = [found.nats, found.num_targets]
        reshard(run.objective.model)
    total, *curves, num_summands, asked = sum_over_ranks(
        run, torch.tensor([*own, float(stop.asked)], dtype=torch.float64), "the held-out loss"
    ).tolist()
    progress.held_out_pending = asked > 0
    if progress.held_out_pending:
        return False
    loss = HeldOutLoss(total, int(num_summands), run.held_out.num_bytes)
    run.progress.log_lines += 1
    run.reporter.write_held_out(
        {
            "event": "held_out",
            "step": progress.step,
            "draw": progress.draw,
            "tokens_seen": progress.tokens_seen,
            "held_out_loss": finite_or_none(loss.nats_per_token),
            "held_out_bits_per_byte": None if loss.bits_per_byte is None else finite_or_none(loss.bits_per_byte),
            "held_out_tokens": run.held_out.num_targets,
            **{
                f"held_out_{name}": finite_or_none(curve / num_summands)
                for name, curve in zip(run.objective.curves, curves, strict=True)
            },
        }
    )
    best = progress.best_held_out_loss
    improved = math.isfinite(loss.nats_per_token) and (best is None or loss.nats_per_token < best)
    if improved and progress.step > 0:
        progress.best_step, progress.best_held_out_loss = progress.step, loss.nats_per_token
    return improved


def _noted(run: TrainingRun, batch: MicroBatch) -> MicroBatch:
    run.watch.at("measuring the held-out loss", run.progress.draw)
    return batch
