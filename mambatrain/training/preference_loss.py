"""Direct preference optimization: an answer that was chosen becomes likelier than the one that was rejected.

The module stands in `NextTokenLoss`'s place, so that the loop knows one objective as the other.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambatrain.data.batches import IGNORED_TARGET, MicroBatch
from mambatrain.evaluation.held_out import evaluating
from mambatrain.models.language_model import LanguageModel
from mambatrain.recipe.preference_section import PreferenceSection


class PreferenceLoss(nn.Module):
    """-log sigmoid(reward of the chosen answer - reward of the rejected one) (DPO: arXiv 2305.18290, equation 7).

    The reward of an answer is beta (log p(answer) - log p_reference(answer)); length-normalised, both divided by the
    answer's counted tokens (arXiv 2411.15124, equation 6).
    """

    curves = ("reward_margin", "reward_accuracy", "rewards_chosen", "rewards_rejected")
    """What is logged beside the loss, means over pairs: the margin in nats, and the share of pairs whose is above 0."""
    start: None = None
    """No trained state: every answer begins with an empty one."""

    def __init__(self, model: LanguageModel, section: PreferenceSection) -> None:
        super().__init__()
        self.model = model
        self.section = section

    def forward(self, tokens: Tensor, boundaries: Tensor, targets: Tensor, references: Tensor) -> Tensor:
        """tokens, boundaries, targets (B, L), a pair a row, references (B, 2) -> sums over pairs (5,) in fp64.

        The loss comes first, in nats; behind it, without gradients, what the curves are the means of.
        """
        log_probabilities, num_counted = answer_log_probabilities(self.model, tokens, boundaries, targets)
        gained = log_probabilities - references  # (B, 2)
        if self.section.length_normalised:
            gained = gained / num_counted.clamp(min=1)
        rewards = self.section.beta * gained
        is_pair = num_counted[:, 0] > 0  # else a row that only fills up a rank's share
        margins = (rewards[:, 0] - rewards[:, 1])[is_pair]
        loss = -F.logsigmoid(margins).sum()
        with torch.no_grad():
            curves = [margins.sum(), (margins > 0).sum(), *rewards[is_pair].sum(dim=0)]
        return torch.stack([loss, *(curve.to(loss) for curve in curves)])

    def num_summands(self, micro_batch: MicroBatch) -> int:
        """Pairs: what the summed loss is divided by."""
        return int((micro_batch.targets != IGNORED_TARGET).any(dim=1).sum())

    def measure(self, micro_batches: Iterable[MicroBatch]) -> list[float]:
        """Sums over pairs as `forward` gives them, and the number of pairs; autocast is the caller's."""
        sums, num_pairs = torch.zeros(1 + len(self.curves), dtype=torch.float64), 0
        with evaluating(self):
            for batch in micro_batches:
                sums += self(*batch.inputs).cpu()
                num_pairs += self.num_summands(batch)
        return [*sums.tolist(), float(num_pairs)]


def answer_log_probabilities(
    model: LanguageModel, tokens: Tensor, boundaries: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the two answers of each row, what begins at its first and at its second boundary.

    Args:
        model: whose.
        tokens, boundaries, targets: (B, L), two boundaries a row.

    Returns:
        Log-probabilities in nats, summed over what counts: (B, 2) fp64; and how many tokens count: (B, 2) int64.
    """
    losses = model.token_losses(tokens, boundaries, targets).double()
    is_second = boundaries.cumsum(dim=1) > 1
    counted = targets != IGNORED_TARGET
    summed = [-(losses * where).sum(dim=1) for where in (~is_second, is_second)]
    num_counted = [(counted & where).sum(dim=1) for where in (~is_second, is_second)]
    return torch.stack(summed, dim=1), torch.stack(num_counted, dim=1)
