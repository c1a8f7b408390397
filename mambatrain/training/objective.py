"""What a micro-batch is trained on. The module that DDP wraps, so that the loss is made inside forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mambatrain.adapters.initial_state import InitialState, begin_rows
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.state import BlockState

if TYPE_CHECKING:
    from mambatrain.data.batches import MicroBatch


class NextTokenLoss(nn.Module):
    """Summed next-token loss; dividing by the step's global number of counted targets is the loop's."""

    curves: tuple[str, ...] = ()
    """What is logged beside the loss."""

    def __init__(self, model: LanguageModel, start: InitialState | None = None) -> None:
        super().__init__()
        self.model = model
        self.start = start
        """The trained state that every row begins with; None: an empty one."""
        self.behind: list[BlockState] = []
        """The states behind the rows of the last forward pass that was given some, detached."""

    def num_summands(self, micro_batch: MicroBatch) -> int:
        """Counted targets: what the summed loss is divided by."""
        return micro_batch.num_targets

    def first_state(self) -> list[BlockState] | None:
        """What every row begins with, B = 1; None: an empty one, where the boundaries say so."""
        return None if self.start is None else self.start.layers()

    def forward(
        self, tokens: Tensor, boundaries: Tensor, targets: Tensor, state: list[BlockState] | None = None
    ) -> Tensor:
        """tokens (B, L), boundaries (B, L), targets (B, L) -> summed loss in nats, a scalar.

        With a state, one per layer, rows go on from it, and `behind` has what they left.
        """
        if state is not None:
            loss, self.behind = self.model.loss_and_state(tokens, boundaries, targets, state)
            return loss
        boundaries, state = begin_rows(self.first_state(), boundaries)
        return self.model.summed_loss(tokens, boundaries, targets, state)
