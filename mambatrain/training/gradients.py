"""The gradients of one draw: its rows forward and backward, summed over micro-batches and ranks."""

from __future__ import annotations

import time
from typing import cast

import torch

from mambatrain.training.carried import are_finite, joined, states_of
from mambatrain.training.objective import NextTokenLoss
from mambatrain.training.sharding import clip_gradients, sum_gradients_in_next_backward
from mambatrain.training.stop import StopRequest
from mambatrain.training.training_run import Draw, TrainingRun, sum_over_ranks


def compute_gradients(run: TrainingRun, stop: StopRequest) -> Draw:
    """Forward and backward over this rank's micro-batches; gradients are summed over ranks and clipped.

    The loss is summed over the whole step and divided once by the global number of counted targets (of pairs), so
    that it does not depend on how the rows were split into ranks and micro-batches.
    """
    accelerator, device = run.accelerator, run.accelerator.device
    started = time.perf_counter()
    run.watch.at("reading its rows", run.progress.draw)
    share = run.row_share
    rows = run.order.micro_batches(run.progress.draw, run.micro_batch_rows, share.group, share.num_groups)
    micro_batches = [micro_batch.part(share.part, share.num_parts) for micro_batch in rows]
    data_seconds = time.perf_counter() - started
    own = [[batch.num_targets, run.objective.num_summands(batch)] for batch in micro_batches]
    counts = sum_over_ranks(run, torch.tensor(own, dtype=torch.float64).sum(dim=0), "the targets")
    num_targets, num_summands = map(int, counts.tolist())
    sums = torch.zeros(1 + len(run.objective.curves), dtype=torch.float64, device=device)
    behind, num_rows = [], 0
    for index, micro_batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        run.watch.at("computing gradients", run.progress.draw)
        sum_gradients_in_next_backward(run.prepared, run.objective.model, wanted=is_last)
        carried = [] if run.carried is None else [states_of(run.carried, num_rows, len(micro_batch.tokens))]
        num_rows += len(micro_batch.tokens)
        with accelerator.autocast():
            summed = run.prepared(*micro_batch.to(device).inputs, *carried).reshape(-1)  # the loss, and the curves
        # Ranks' gradients are averaged; we want the sum, hence the factor.
        (summed[0] * (accelerator.num_processes / max(num_summands, 1))).backward()
        sums += summed.detach()
        behind += [cast(NextTokenLoss, run.objective).behind] if carried else []
    gradient_norm = clip_gradients(run.prepared.parameters(), run.recipe.training.clip_norm)
    states = None if run.carried is None else joined(behind)
    unfit = float(states is not None and not are_finite(states))
    ends = stop.asked or run.background.has_failed
    # One reduction for all that the ranks must agree on.
    norm, asked, unfit, total, *curves = sum_over_ranks(
        run, torch.tensor([gradient_norm, float(ends), unfit, *sums.tolist()], dtype=torch.float64), "the loss"
    ).tolist()
    return Draw(
        loss=total / max(num_summands, 1),
        curves={name: curve / max(num_summands, 1) for name, curve in zip(run.objective.curves, curves, strict=True)},
        gradient_norm=norm / accelerator.num_processes,
        num_targets=num_targets,
        data_seconds=data_seconds,
        behind=states,
        states_are_finite=unfit == 0,
        stop_asked=asked > 0,
    )
