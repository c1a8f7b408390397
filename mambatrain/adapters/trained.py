"""What a run trains: some tensors by the names they have in its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from mambatrain.errors import UserError
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import parameter_rows


@dataclass
class TrainedTensors:
    """The tensors that the optimizer moves."""

    parameters: dict[str, nn.Parameter]
    decaying: frozenset[str]
    """Names to which weight decay applies."""
    matrices: frozenset[str] = frozenset()
    """Names that Muon may move."""
    partners: dict[str, str] = field(default_factory=dict)
    """Factor of a product -> the other one; while that is 0, the gradient of this is."""
    unproven: set[str] = field(default_factory=set)
    """Adapter tensors that have not had a gradient yet."""

    def refuse_no_gradient(self) -> None:
        """After a backward pass: every adapter tensor has a gradient, once there can be one.

        Raises:
            UserError: naming those that have none.
        """
        dead = []
        for name in sorted(self.unproven):
            partner = self.partners.get(name)
            if partner is not None and not self.parameters[partner].any():
                continue  # the partner begins at 0, and moves first
            gradient = self.parameters[name].grad
            if gradient is None or not gradient.any():
                dead.append(name)
            else:
                self.unproven.remove(name)
        if dead:
            more = f" and {len(dead) - 5} more" if len(dead) > 5 else ""
            raise UserError(
                f"the loss does not depend on what is to be trained: no gradient reaches {', '.join(dead[:5])}{more}",
                "leave these targets out, or look at the weights: some of theirs may be 0",
            )


def whole_model(model: LanguageModel) -> TrainedTensors:
    """Every parameter, as the model's table says."""
    rows = parameter_rows(model.section)
    return TrainedTensors(
        dict(model.named_parameters()),
        frozenset(name for name in rows if rows[name].decays),
        frozenset(name for name in rows if rows[name].is_matrix),
    )
