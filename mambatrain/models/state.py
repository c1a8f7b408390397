"""What a block remembers between two calls, and what a model remembers of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class BlockState(NamedTuple):
    """The recurrent state of one block, of the same size after one token and after a million."""

    window: Tensor
    """(B, W - 1, D): the last inputs of the convolution, oldest first; 0 before the last boundary."""
    ssm: Tensor
    """(B, E, N) for Mamba-1, (B, H, P, N) for Mamba-2; fp32 (fp64 in an fp64 model)."""


@dataclass(frozen=True)
class TextState:
    """All that is needed to go on behind a text as if it had just been read; or a state that was trained, to begin one.

    Nothing changes it in place.
    """

    layers: list[BlockState]
    """One per layer, B = 1."""
    hidden: Tensor | None
    """(d_model,): the last position behind the last norm; the head makes the next token's logits of it. None before a
    text: a document begins with such a state as others do with an empty one."""
    num_tokens: int
    """How many were read; 0 before a text."""
    seen_ids: frozenset[int]
    """Which ids were read: what a repetition penalty is about."""
