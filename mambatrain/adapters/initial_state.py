"""The state that a text begins with, as something to be trained: a soft prompt that costs no position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambatrain.models.language_model import LanguageModel
from mambatrain.models.state import BlockState


class InitialState(nn.Module):
    """One state per layer, 0 at first, from which every row starts. What is not trained stays 0."""

    def __init__(self, model: LanguageModel, with_windows: bool) -> None:
        super().__init__()
        weight = model.norm_f.weight  # fp32 under every precision, fp64 in an fp64 model
        empty = model.init_state(1, weight.device, weight.dtype)
        self.ssm = nn.ParameterList(nn.Parameter(layer.ssm) for layer in empty)
        self.windows = nn.ParameterList(nn.Parameter(layer.window) for layer in empty) if with_windows else None
        self._window_shape = tuple(empty[0].window.shape)

    def layers(self) -> list[BlockState]:
        """The state, B = 1; gradients reach what is trained."""
        windows: list[Tensor] = [torch.zeros(self._window_shape).to(h) for h in self.ssm]
        if self.windows is not None:
            windows = list(self.windows)
        return [BlockState(window, h) for window, h in zip(windows, self.ssm, strict=True)]


def state_names(start: InitialState) -> list[str]:
    """Names in a checkpoint, in the order of `start.parameters()`."""
    windows = [] if start.windows is None else [f"layers.{layer}.window" for layer in range(len(start.windows))]
    return [f"layers.{layer}.ssm" for layer in range(len(start.ssm))] + windows


def begin_rows(start: list[BlockState] | None, boundaries: Tensor) -> tuple[Tensor, list[BlockState] | None]:
    """Boundaries and state of rows that each begin with a document.

    A boundary drops the state, so with a trained one there is none at a row's first position.

    Args:
        start: B = 1; None: as the boundaries say.
        boundaries: (B, L) bool.
    """
    if start is None:
        return boundaries, None
    boundaries = boundaries.clone()
    boundaries[:, 0] = False
    rows = len(boundaries)
    return boundaries, [BlockState(window.expand(rows, -1, -1), h.expand(rows, *h.shape[1:])) for window, h in start]
