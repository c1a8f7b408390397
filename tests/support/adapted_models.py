"""Small models with adapters away from their first values, and texts for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambatrain.adapters.attach import attach_adapter
from mambatrain.adapters.initial_state import InitialState, begin_rows
from mambatrain.adapters.trained import TrainedTensors
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import AdapterSection, ModelSection

CPU = torch.device("cpu")
PROJECTIONS = {"mamba1": ["in_proj", "x_proj", "dt_proj", "out_proj"], "mamba2": ["in_proj", "out_proj"]}
TUNABLE = ["conv1d", "A_log", "D", "dt_bias"]


def section_of(block: str, **changes: Any) -> ModelSection:
    own = {"head_dim": 16} if block == "mamba2" else {"dt_rank": 4}  # of one column, DoRA trains no direction
    return ModelSection.model_validate(
        {"block": block, "d_model": 16, "num_layers": 2, "vocab_size": 40, "d_state": 8} | own | changes
    )


def base_model(section: ModelSection, backend: str = "torch", dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = LanguageModel(section, choose_backend(backend, CPU, dtype)).to(dtype)
    initialise(model, section, 0)
    return model


def everything(block: str, kind: str, tied: bool = True) -> AdapterSection:
    """All that can have an adapter of a kind, and all that can be tuned."""
    embedding = ["embedding"] if kind == "lora" or not tied else []
    head = [] if tied else ["lm_head"]
    targets = [*PROJECTIONS[block], *embedding, *head]
    return AdapterSection.model_validate(
        {"kind": kind, "rank": 3, "alpha": 6.0, "rank_stabilised": True, "targets": targets, "tune": TUNABLE}
    )


def adapted(model: LanguageModel, adapter: AdapterSection) -> tuple[TrainedTensors, InitialState | None]:
    """Attached, and every trained tensor moved: B is 0 at first, and much would be hidden behind that."""
    trained, start = attach_adapter(model, adapter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters.values():
            moved = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(moved.to(parameter.dtype))
    return trained, start


def some_rows(rows: int = 2, length: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, boundaries, targets; a document begins in the middle of the second row."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 40, (rows, length + 1), generator=generator)
    boundaries = torch.zeros(rows, length, dtype=torch.bool)
    boundaries[:, 0] = True
    boundaries[1, 7] = True
    return ids[:, :-1], boundaries, ids[:, 1:].contiguous()


def loss_of(model: LanguageModel, start: InitialState | None = None) -> Tensor:
    tokens, boundaries, targets = some_rows()
    boundaries, state = begin_rows(None if start is None else start.layers(), boundaries)
    return model.summed_loss(tokens, boundaries, targets, state)
