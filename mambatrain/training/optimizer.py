"""What moves the parameters: groups from the parameter table, and the optimizers' state as tensors by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import parameter_rows
from mambatrain.training.narrow_adamw import NarrowAdamW
from mambatrain.training.schedule_free import ScheduleFreeAdamW

if TYPE_CHECKING:
    from mambatrain.recipe import OptimizerSection

Optimizers = Sequence[torch.optim.Optimizer]
"""Together they cover every parameter once: one, or Muon and AdamW."""


def build_optimizers(model: LanguageModel, section: OptimizerSection) -> Optimizers:
    """Groups of parameters that decay and that do not, as the model's parameter table says.

    muon: the projections inside the blocks, which the table calls matrices, are Muon's; all else (embedding, head,
    norms, convolutions, `A_log`, which is two-dimensional and no matrix) is AdamW's.
    """
    rows = parameter_rows(model.section)
    names = [name for name, _ in model.named_parameters()]
    matrices = [name for name in names if section.kind == "muon" and rows[name].is_matrix]
    others = [name for name in names if name not in matrices]
    optimizers = [_elementwise(_groups(model, section, others), section)]
    if matrices:
        muon = torch.optim.Muon(
            _groups(model, section, matrices),
            lr=section.learning_rate,
            momentum=section.muon_momentum,
            # An orthogonal update scaled to the size of AdamW's (arXiv 2502.16982, section 2.2): one rate, one decay.
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(muon)
    return optimizers


def _groups(model: LanguageModel, section: OptimizerSection, names: Sequence[str]) -> list[dict[str, object]]:
    rows, parameters = parameter_rows(model.section), dict(model.named_parameters())
    groups = [
        (
            section.weight_decay if decaying else 0.0,
            [parameters[name] for name in names if rows[name].decays == decaying],
        )
        for decaying in (True, False)
    ]
    return [{"params": params, "weight_decay": weight_decay} for weight_decay, params in groups if params]


def _elementwise(groups: list[dict[str, object]], section: OptimizerSection) -> torch.optim.Optimizer:
    betas, eps = (section.beta1, section.beta2), section.eps
    if section.kind == "schedule_free":
        return ScheduleFreeAdamW(groups, section.learning_rate, betas, eps)
    if section.state_precision == "bf16":
        return NarrowAdamW(groups, section.learning_rate, betas, eps)
    # fused: one pass over memory for all of a group, on CPU and CUDA
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=betas, eps=eps, fused=True)


def set_learning_rate(optimizers: Optimizers, learning_rate: float) -> None:
    """The rate of the next update, for every group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


def optimizer_tensors(optimizers: Optimizers, model: LanguageModel) -> dict[str, Tensor]:
    """`PARAMETER.FIELD` -> tensor, for a checkpoint."""
    return {
        f"{name}.{field}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        if parameter in optimizer.state
        for field, value in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizers: Optimizers, model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """The inverse of optimizer_tensors."""
    parameters = dict(model.named_parameters())
    owner = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for key, value in tensors.items():
        name, field = key.rsplit(".", 1)
        parameter = parameters[name]
        # fused AdamW wants its step count beside the parameter, and each field has the dtype that it had
        owner[parameter].state[parameter][field] = value.to(parameter.device)
    for optimizer in optimizers:
        if isinstance(optimizer, ScheduleFreeAdamW):
            optimizer.return_to_trained()  # a checkpoint's weights are the averaged ones
