"""How well a model predicts text it has not seen: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from mambatrain.adapters.initial_state import begin_rows
from mambatrain.data.batches import MicroBatch
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.state import BlockState


class HeldOutLoss(NamedTuple):
    """Sums, so that ranks add their shares before they divide."""

    nats: float
    """Summed -log p(target)."""
    num_targets: int
    """Tokens predicted."""
    num_bytes: int | None
    """UTF-8 bytes of the text those tokens stand for; None: not known."""

    @property
    def nats_per_token(self) -> float:
        """Depends on the tokenizer: compare only models that share one."""
        return self.nats / self.num_targets

    @property
    def perplexity(self) -> float:
        """exp(nats per token); inf where that is beyond a float."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709.0 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable across tokenizers; None where nothing says how many bytes the text has."""
        return None if self.num_bytes is None else self.nats / math.log(2.0) / self.num_bytes


def measure_held_out(
    model: LanguageModel,
    micro_batches: Iterable[MicroBatch],
    num_bytes: int | None,
    start: list[BlockState] | None = None,
) -> HeldOutLoss:
    """The loss over all counted targets of some rows.

    Weights, gradients, random state and the training mode are left as they are.

    Args:
        model: the module itself, not wrapped; autocast is the caller's (none: the dtype of the weights).
        micro_batches: of this process; with several, the caller sums `nats` and `num_targets` over them.
        num_bytes: of the text of all rows; None: not known.
        start: a trained state that every row begins with, B = 1.
    """
    nats, num_targets = 0.0, 0
    with evaluating(model):
        for batch in micro_batches:
            batch = batch.to(model.head_weight.device)
            boundaries, state = begin_rows(start, batch.boundaries)
            loss = model.summed_loss(batch.tokens, boundaries, batch.targets, state)
            nats += float(loss)  # a Python float is fp64; waits for the device once a micro-batch
            num_targets += batch.num_targets
    return HeldOutLoss(nats, num_targets, num_bytes)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, and evaluation mode until the block ends, however it ends; each module's own mode comes back.

    no_grad rather than inference_mode: what a model keeps for later must stay fit for training.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
