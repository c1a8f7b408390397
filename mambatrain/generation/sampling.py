"""From logits to one token id: which ids may be drawn, with which probability."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from mambatrain.errors import UserError


@dataclass(frozen=True)
class SamplingSettings:
    """How a token is drawn. The rules apply in the order of the fields below, as in transformers.

    Raises:
        UserError: a value outside its range.
    """

    repetition_penalty: float = 1.0
    """Logits of ids that were seen are divided by this where positive, multiplied where negative; 1 is off
    (CTRL, arXiv 1909.05858, section 4.1)."""
    temperature: float = 1.0
    """Logits are divided by this; 0 takes the likeliest id, and the rules below have no effect."""
    top_k: int = 0
    """Only the k likeliest ids (and those tied with the last of them); 0 is off."""
    top_p: float = 1.0
    """Only the fewest likeliest ids whose probabilities sum to at least this; 1 is off (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Only ids at least this many times as likely as the likeliest; 0 is off (arXiv 2407.01082)."""
    seed: int = 0
    """Of the generator that draws."""

    def __post_init__(self) -> None:
        ranges = {
            "repetition_penalty": (0.0 < self.repetition_penalty < math.inf, "above 0"),
            "temperature": (0.0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "min_p": (0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            "seed": (0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
        }
        for name, (holds, allowed) in ranges.items():
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)}", f"give a value {allowed}")

    def generator(self) -> torch.Generator:
        """A fresh generator at the seed, on the CPU: a seed gives one text, whatever device the model is on."""
        return torch.Generator("cpu").manual_seed(self.seed)


def sample(
    logits: Tensor, settings: SamplingSettings, generator: torch.Generator, previous: Collection[int], vocab_size: int
) -> int:
    """Draws the next id.

    Args:
        logits: (V,) of the last position; V may exceed vocab_size by the padding rows of the embedding.
        settings: see SamplingSettings.
        generator: on the CPU; advances by one draw, or not at all when the temperature is 0.
        previous: the ids seen so far, which the repetition penalty is about.
        vocab_size: ids from here on are padding rows and are never drawn.
    """
    scores = penalised(logits.detach().to("cpu", torch.float32)[:vocab_size], settings.repetition_penalty, previous)
    if settings.temperature == 0.0:
        return int(scores.argmax())
    return int(torch.multinomial(probabilities(scores, settings), 1, generator=generator))


def penalised(scores: Tensor, penalty: float, previous: Collection[int]) -> Tensor:
    """The logits (V,) with those of seen ids moved towards unlikely."""
    if penalty == 1.0 or not previous:
        return scores
    seen = torch.tensor(sorted(set(previous)))
    moved = scores[seen]
    return scores.index_copy(0, seen, torch.where(moved > 0, moved / penalty, moved * penalty))


def probabilities(scores: Tensor, settings: SamplingSettings) -> Tensor:
    """(V,) probabilities after temperature, top-k, top-p and min-p; the ids left out have 0."""
    # The largest score is taken off before the division, so that a tiny temperature overflows towards -inf only.
    scores = (scores - scores.max()) / settings.temperature
    if 0 < settings.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(settings.top_k).values[-1], -torch.inf)
    if settings.top_p < 1.0:
        likeliest, order = torch.softmax(scores, 0).sort(descending=True, stable=True)
        # An id is left out when the likelier ones reach top_p without it; the first is always kept.
        left_out = likeliest.cumsum(0) - likeliest >= settings.top_p
        scores = scores.index_fill(0, order[left_out], -torch.inf)
    chances = torch.softmax(scores, 0)
    if settings.min_p > 0.0:
        chances = chances.where(chances >= settings.min_p * chances.max(), 0.0)
    return chances / chances.sum()
