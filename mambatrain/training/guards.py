"""What must hold before weights change (promise: nothing bad is applied)."""

from __future__ import annotations

import math

from mambatrain.errors import UserError

# A few bad batches in a row are data; this many are a run that has diverged.
MAX_SKIPPED_IN_A_ROW = 10


def find_fault(loss: float, gradient_norm: float, num_targets: int) -> str | None:
    """Why an update must not be applied, or None. The arguments are those of all ranks together."""
    if num_targets == 0:
        return "no target counts"
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(gradient_norm):
        return f"the gradient norm is {gradient_norm}"
    return None


def refuse_endless_skipping(skipped_in_a_row: int, draw: int, fault: str) -> None:
    """
    Raises:
        UserError: too many draws in a row were skipped.
    """
    if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise UserError(
            f"{skipped_in_a_row} draws in a row were skipped, the last one (draw {draw}) because {fault}",
            "the newest checkpoint is whole; lower optimizer.learning_rate and start a new run, or look at the data",
        )
