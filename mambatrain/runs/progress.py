"""How far a run is: the counters that a checkpoint keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Running:
    """What some number has been over the last applied draws."""

    count: int = 0
    """Draws it stands for; at most `guards.memory_draws`."""
    mean: float = 0.0
    variance: float = 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        return math.sqrt(self.variance)


@dataclass
class Progress:
    """How far a run is. `draw` decides the data, `step` the schedule; a skipped draw moves the first alone."""

    step: int = 0
    """Applied updates."""
    draw: int = 0
    """Batches drawn."""
    tokens_seen: int = 0
    """Counted targets of applied updates."""
    skipped_in_a_row: int = 0
    """Draws that were not applied since the last one that was."""
    best_step: int | None = None
    """Step with the lowest held-out loss so far."""
    best_held_out_loss: float | None = None
    """That loss, in nats per token."""
    log_lines: int = 0
    """Lines of log.jsonl that belong to this point."""
    held_out_pending: bool = False
    """Whether a held-out evaluation of this point was due and was cut short by a request to stop."""
    running: dict[str, Running] = field(default_factory=dict)
    """Of the loss and the gradient norm of applied draws: what a draw is judged by."""
