"""What moves the parameters: groups of what is trained, and the optimizers' state as tensors by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambatrain.adapters.trained import TrainedTensors
from mambatrain.recipe.parameter_section import ALL_PARAMETERS, ParameterSection
from mambatrain.training.eight_bit_adamw import EightBitAdamW
from mambatrain.training.name_patterns import rates_of
from mambatrain.training.narrow_adamw import NarrowAdamW
from mambatrain.training.schedule_free import ScheduleFreeAdamW

if TYPE_CHECKING:
    from mambatrain.recipe import OptimizerSection

Optimizers = Sequence[torch.optim.Optimizer]
"""Together they cover every trained parameter once: one, or Muon and AdamW."""


def build_optimizers(
    trained: TrainedTensors, section: OptimizerSection, choice: ParameterSection = ALL_PARAMETERS
) -> Optimizers:
    """Groups of what is trained: what decays, and what does not, at each of their rates; frozen ones are in none.

    muon: matrices inside the blocks are Muon's; all else (embedding, head, norms, convolutions, `A_log`, which is
    two-dimensional and no matrix) is AdamW's.

    Raises:
        UserError: a pattern of names in `choice` fits nothing.
    """
    rates = rates_of(choice, list(trained.parameters))
    names = [name for name, parameter in trained.parameters.items() if parameter.requires_grad]
    matrices = [name for name in names if section.kind == "muon" and name in trained.matrices]
    others = [name for name in names if name not in matrices]
    optimizers = [_elementwise(_groups(trained, section, others, rates), section)] if others else []
    if matrices:
        muon = torch.optim.Muon(
            _groups(trained, section, matrices, rates),
            lr=section.learning_rate,
            momentum=section.muon_momentum,
            # An orthogonal update scaled to the size of AdamW's (arXiv 2502.16982, section 2.2): one rate, one decay.
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(muon)
    return optimizers


def _groups(
    trained: TrainedTensors, section: OptimizerSection, names: Sequence[str], rates: dict[str, float]
) -> list[dict[str, object]]:
    groups = [
        (
            section.weight_decay if decaying else 0.0,
            times,
            [
                trained.parameters[name]
                for name in names
                if (name in trained.decaying) == decaying and rates[name] == times
            ],
        )
        for times in dict.fromkeys(rates[name] for name in names)
        for decaying in (True, False)
    ]
    return [
        {"params": params, "weight_decay": weight_decay, "times": times}
        for weight_decay, times, params in groups
        if params
    ]


def _elementwise(groups: list[dict[str, object]], section: OptimizerSection) -> torch.optim.Optimizer:
    betas, eps = (section.beta1, section.beta2), section.eps
    if section.kind == "schedule_free":
        return ScheduleFreeAdamW(groups, section.learning_rate, betas, eps)
    if section.state_precision == "bf16":
        return NarrowAdamW(groups, section.learning_rate, betas, eps)
    if section.state_precision == "8bit":
        return EightBitAdamW(groups, section.learning_rate, betas, eps)
    # fused: one pass over memory for all of a group, on CPU and CUDA
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=betas, eps=eps, fused=True)


def set_learning_rate(optimizers: Optimizers, learning_rate: float) -> None:
    """The rate of the next update; each group has it times its own factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["times"]


def optimizer_tensors(optimizers: Optimizers, trained: TrainedTensors) -> dict[str, Tensor]:
    """`PARAMETER.FIELD` -> tensor, for a checkpoint."""
    return {
        f"{name}.{field}": value
        for name, parameter in trained.parameters.items()
        for optimizer in optimizers
        if parameter in optimizer.state
        for field, value in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizers: Optimizers, trained: TrainedTensors, tensors: dict[str, Tensor]) -> None:
    """The inverse of optimizer_tensors."""
    owner = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for key, value in tensors.items():
        name, field = key.rsplit(".", 1)
        parameter = trained.parameters[name]
        # fused AdamW wants its step count beside the parameter, and each field has the dtype that it had
        owner[parameter].state[parameter][field] = value.to(parameter.device)
    for optimizer in optimizers:
        if isinstance(optimizer, ScheduleFreeAdamW):
            optimizer.return_to_trained()  # a checkpoint's weights are the averaged ones
