"""The model with its values, and what is trained of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mambatrain.adapters.attach import attach_adapter
from mambatrain.adapters.trained import TrainedTensors, whole_model
from mambatrain.devices import Precision
from mambatrain.errors import UserError
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import Backend
from mambatrain.recipe import Recipe
from mambatrain.runs.checkpoint import MODEL_FILE
from mambatrain.runs.tensor_files import read_tensors
from mambatrain.runs.weights import Weights
from mambatrain.training.objective import NextTokenLoss


def build_objective(
    recipe: Recipe,
    backend: Backend,
    device: torch.device,
    precision: Precision,
    checkpoint: Path | None,
    weights: Weights | None,
) -> tuple[NextTokenLoss, TrainedTensors]:
    """What a micro-batch is trained on, and the tensors that the optimizer moves.

    A run that trains an adapter takes the model from its weights at each start: checkpoints hold the adapter alone.
    """
    if recipe.adapter is None:
        model = build_model(recipe, backend, device, precision, checkpoint, weights)
        return NextTokenLoss(model), whole_model(model)
    assert weights is not None, "an adapter stands on weights"
    model = build_model(recipe, backend, device, precision, None, weights)
    trained, start = attach_adapter(model, recipe.adapter)
    if checkpoint is not None:
        trained.fill(read_tensors(checkpoint / MODEL_FILE), str(checkpoint))
    return NextTokenLoss(model, start), trained


def build_model(
    recipe: Recipe,
    backend: Backend,
    device: torch.device,
    precision: Precision,
    checkpoint: Path | None,
    weights: Weights | None,
) -> LanguageModel:
    """The model with its values: from a checkpoint, else from weights, else from the parameter table."""
    with torch.device("meta"):
        model = LanguageModel(recipe.model, backend)
    model = model.to_empty(device=device)
    model.to(parameter_dtype(precision))
    model.recompute_every = recipe.recompute_every
    if checkpoint is not None:
        fill_parameters(model, read_tensors(checkpoint / MODEL_FILE))
    elif weights is not None:
        fill_parameters(model, weights.tensors)
    else:
        initialise(model, recipe.model, recipe.training.seed)
    return model


@torch.no_grad()
def fill_parameters(model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Copies tensors into the parameters of the same names; none may be missing or left over."""
    parameters = dict(model.named_parameters())
    if differing := parameters.keys() ^ tensors.keys():
        raise UserError(
            f"the weights do not fit the recipe's model: {', '.join(sorted(differing)[:5])}",
            "leave the recipe's model section out: the weights say what the model is",
        )
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def parameter_dtype(precision: Precision) -> torch.dtype:
    """Parameters are fp32 under bf16 too: autocast narrows the matrix products alone."""
    return torch.float64 if precision == "fp64" else torch.float32
