"""What a micro-batch is trained on. The module that DDP wraps, so that the loss is made inside forward."""

from __future__ import annotations

from torch import Tensor, nn

from mambatrain.models.language_model import LanguageModel
from mambatrain.ops.cross_entropy import chunked_cross_entropy


class NextTokenLoss(nn.Module):
    """Summed next-token loss; dividing by the step's global number of counted targets is the loop's."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, boundaries: Tensor, targets: Tensor) -> Tensor:
        """tokens (B, L), boundaries (B, L), targets (B, L) -> summed loss in nats, a scalar."""
        hidden, _ = self.model.hidden_states(tokens, boundaries)
        return chunked_cross_entropy(hidden.flatten(0, 1), self.model.head_weight, targets.flatten())
