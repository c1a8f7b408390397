"""The model with its values, and what is trained of it."""

from __future__ import annotations

import torch

from mambatrain.adapters.attach import attach_adapter
from mambatrain.adapters.initial_state import InitialState, begin_with, read_start
from mambatrain.adapters.trained import TrainedTensors, whole_model
from mambatrain.devices import Precision
from mambatrain.errors import UserError
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import check_table_covers, initial_value, parameter_shapes
from mambatrain.ops.backends import Backend
from mambatrain.recipe import Recipe
from mambatrain.runs.weights import Weights
from mambatrain.training.objective import NextTokenLoss
from mambatrain.training.preference_loss import PreferenceLoss
from mambatrain.training.sharding import fill, make_mesh, shard_model


def build_objective(
    recipe: Recipe,
    backend: Backend,
    device: torch.device,
    precision: Precision,
    weights: Weights | None,
    shards: int,
    begins: bool,
) -> tuple[NextTokenLoss | PreferenceLoss, TrainedTensors]:
    """What a micro-batch is trained on, and the tensors that the optimizer moves.

    A run that trains an adapter takes the model from its weights at each start: checkpoints hold the adapter alone.

    Args:
        recipe, backend, device, precision: of the run.
        weights: what the model starts from; None: the parameter table.
        shards: how many ranks share one copy of the model.
        begins: False where a checkpoint will fill what is trained.
    """
    model = build_model(recipe, backend, device, precision, shards)
    if recipe.adapter is None:
        if begins:
            fill_parameters(model, recipe, weights)
        return _objective_of(recipe, model), whole_model(model)
    assert weights is not None, "an adapter stands on weights"
    fill_parameters(model, recipe, weights)
    trained, start = attach_adapter(model, recipe.adapter)
    if begins and start is not None and (layers := read_start(recipe.adapter, weights)) is not None:
        begin_with(start, layers)
    return _objective_of(recipe, model, start), trained


def _objective_of(
    recipe: Recipe, model: LanguageModel, start: InitialState | None = None
) -> NextTokenLoss | PreferenceLoss:
    if recipe.preferences is not None:
        return PreferenceLoss(model, recipe.preferences)
    return NextTokenLoss(model, start)


def build_model(
    recipe: Recipe, backend: Backend, device: torch.device, precision: Precision, shards: int
) -> LanguageModel:
    """The model without values: whole, or this rank's shards of it."""
    with torch.device("meta"):
        model = LanguageModel(recipe.model, backend)
    model.to(parameter_dtype(precision))
    model.recompute_every = recipe.recompute_every
    model.segment_tokens = recipe.training.segment_tokens or 0
    if shards > 1:
        shard_model(model, make_mesh(shards, device.type), precision)
    return model.to_empty(device=device)


def fill_parameters(model: LanguageModel, recipe: Recipe, weights: Weights | None) -> None:
    """First values: those of weights, none missing or left over, or those of the parameter table."""
    check_table_covers(model, recipe.model)
    if weights is not None and (differing := parameter_shapes(recipe.model).keys() ^ weights.tensors.keys()):
        raise UserError(
            f"the weights do not fit the recipe's model: {', '.join(sorted(differing)[:5])}",
            "leave the recipe's model section out: the weights say what the model is",
        )
    for name, parameter in model.named_parameters():
        value = initial_value(name, recipe.model, recipe.training.seed) if weights is None else weights.tensors[name]
        fill(parameter, value)


def parameter_dtype(precision: Precision) -> torch.dtype:
    """Parameters are fp32 under bf16 too: autocast narrows the matrix products alone."""
    return torch.float64 if precision == "fp64" else torch.float32
