"""What a micro-batch is trained on. The module that DDP wraps, so that the loss is made inside forward."""

from __future__ import annotations

from torch import Tensor, nn

from mambatrain.models.language_model import LanguageModel


class NextTokenLoss(nn.Module):
    """Summed next-token loss; dividing by the step's global number of counted targets is the loop's."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, boundaries: Tensor, targets: Tensor) -> Tensor:
        """tokens (B, L), boundaries (B, L), targets (B, L) -> summed loss in nats, a scalar."""
        return self.model.summed_loss(tokens, boundaries, targets)
