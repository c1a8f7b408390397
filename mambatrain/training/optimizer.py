"""AdamW with groups from the parameter table, and its state as tensors by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import parameter_rows

if TYPE_CHECKING:
    from mambatrain.recipe import OptimizerSection


def build_optimizer(model: LanguageModel, section: OptimizerSection) -> torch.optim.AdamW:
    """Two groups, decaying and not, as the model's parameter table says; it covers every parameter once."""
    rows = parameter_rows(model.section)
    parameters = dict(model.named_parameters())
    groups = [
        {
            "params": [parameters[name] for name in parameters if rows[name].decays == decaying],
            "weight_decay": section.weight_decay if decaying else 0.0,
        }
        for decaying in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        fused=True,  # one pass over memory for all of a group, on CPU and CUDA
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of the next update, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: LanguageModel) -> dict[str, Tensor]:
    """`PARAMETER.FIELD` -> tensor, for a checkpoint."""
    return {
        f"{name}.{field}": value
        for name, parameter in model.named_parameters()
        for field, value in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """The inverse of optimizer_tensors."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, field = key.rsplit(".", 1)
        parameter = parameters[name]
        # fused AdamW wants its step count beside the parameter; the moments have the parameter's dtype
        optimizer.state[parameter][field] = value.to(parameter.device)
