"""The state that a text begins with, as something to be trained: a soft prompt that costs no position."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mambatrain.errors import UserError
from mambatrain.files import sha256_of
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.state import BlockState
from mambatrain.recipe import AdapterSection
from mambatrain.runs.state_file import place_state, read_state_file
from mambatrain.runs.weights import Weights


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


def read_start(adapter: AdapterSection, weights: Weights) -> list[BlockState] | None:
    """The state that `adapter.start` names, in fp32 on the CPU; None where training begins with an empty one.

    Raises:
        UserError: it is a state of other weights, or its window would be lost.
    """
    if adapter.start is None:
        return None
    file, known = Path(adapter.start), weights.tokenizer_file
    found = read_state_file(file)
    tokenizer = found.facts.tokenizer_sha256 if known is None else sha256_of(known)
    layers = place_state(found, file, weights, tokenizer, torch.empty(0)).layers
    if not adapter.window and any(layer.window.any() for layer in layers):
        raise UserError(
            f"{file} has what stood in the convolutions' windows, and adapter.window is false: it would be lost",
            "--set adapter.window=true trains the windows, too",
        )
    return layers


@torch.no_grad()
def begin_with(start: InitialState, layers: list[BlockState]) -> None:
    """First values; a window that is not trained stays 0."""
    for index, layer in enumerate(layers):
        start.ssm[index].copy_(layer.ssm)
        if start.windows is not None:
            start.windows[index].copy_(layer.window)


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
