"""Everything the loop works on, and what a draw comes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambatrain.adapters.trained import TrainedTensors
from mambatrain.data.held_out_batches import HeldOutBatches
from mambatrain.data.training_order import TrainingOrder
from mambatrain.models.state import BlockState
from mambatrain.runs.progress import Progress
from mambatrain.training.background_save import BackgroundSave
from mambatrain.training.optimizer import Optimizers
from mambatrain.training.sequence import RowShare

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mambatrain.recipe import Recipe
    from mambatrain.runs.folder import RunFolder
    from mambatrain.training.metrics import RunReporter
    from mambatrain.training.objective import NextTokenLoss
    from mambatrain.training.preference_loss import PreferenceLoss
    from mambatrain.training.rank_watch import RankWatch


@dataclass
class TrainingRun:
    """Everything the loop works on."""

    recipe: Recipe
    folder: RunFolder
    accelerator: Accelerator
    objective: NextTokenLoss | PreferenceLoss
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
    row_share: RowShare
    """Which rows of a step this rank works on, and which part of them."""
    micro_batch_rows: int
    carried: list[BlockState] | None
    """What the rows of this rank's slots go on from, with `data.carry_state`; else None."""
    progress: Progress
    reporter: RunReporter
    watch: RankWatch
    """Is told what this rank is about to do."""
    flops_per_token: float
    peak_flops: float
    """Of one device."""
    background: BackgroundSave = field(default_factory=BackgroundSave)
    """The checkpoint that is being written, if any."""


@dataclass(frozen=True)
class Draw:
    """What one draw came to, over all ranks."""

    loss: float
    """Nats per counted target, or per pair."""
    curves: dict[str, float]
    """What the objective tells beside the loss, means over the same."""
    gradient_norm: float
    """Before clipping."""
    num_targets: int
    data_seconds: float
    """Time this rank waited for its rows."""
    behind: list[BlockState] | None
    """What the rows of this rank's slots left, with `data.carry_state`; else None."""
    states_are_finite: bool
    """Whether that is finite on every rank."""
    stop_asked: bool
    """Whether any rank was asked to stop, or could not write a checkpoint in the background."""


def sum_over_ranks(run: TrainingRun, values: Tensor, what: str) -> Tensor:
    """Sums a small fp64 tensor over ranks; the same bits on each."""
    run.watch.meet(f"summing {what}", run.progress.draw)
    if run.accelerator.num_processes == 1:
        return values
    summed: Tensor = run.accelerator.reduce(values.to(run.accelerator.device), "sum")
    return summed
