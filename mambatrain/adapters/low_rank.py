"""A matrix that is computed: W + scale B A, W frozen (LoRA: arXiv 2106.09685; with a trained norm: arXiv 2402.09353).

The operators and blocks read `module.weight` and get the sum, so every backend runs as it does without an adapter.
Matrices are (out, in) here, as a Linear stores them: an embedding (V, d_model) is the transpose of one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Factors:
    """What is trained of one matrix."""

    A: Tensor
    """(rank, in)"""
    B: Tensor
    """(out, rank)"""
    magnitude: Tensor | None = None
    """(out,): a norm for each output (DoRA)."""


def effective_weight(weight: Tensor, factors: Factors, scale: float, transposed: bool) -> Tensor:
    """W + scale B A; with a magnitude, each output's part of that scaled to this norm.

    The norm is differentiated like all else (the paper suggests to take it as a constant, to save memory).

    Args:
        weight: (out, in), or (in, out) where transposed.
        factors: of the same dtype; nothing here is narrowed by autocast.
        scale: of B A.
        transposed: whether the weight is an embedding's.
    """
    left, right, dim = (factors.A.T, factors.B.T, 0) if transposed else (factors.B, factors.A, 1)
    with torch.autocast(weight.device.type, enabled=False):
        summed: Tensor = torch.addmm(weight, left, right, alpha=scale)
        if factors.magnitude is None:
            return summed
        ratio: Tensor = factors.magnitude / output_norms(summed, transposed)
        return summed * ratio.unsqueeze(dim)


def output_norms(weight: Tensor, transposed: bool) -> Tensor:
    """(out,): the norm of what each output is made with; DoRA's first magnitude, with which it changes nothing."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=0 if transposed else 1)
    return norms


class LowRank(nn.Module):
    """The parametrization of a `weight`; holds what is trained of it."""

    def __init__(self, factors: Factors, scale: float, transposed: bool) -> None:
        super().__init__()
        self.scale, self.transposed = scale, transposed
        self.lora_A, self.lora_B = nn.Parameter(factors.A), nn.Parameter(factors.B)
        self.magnitude = None if factors.magnitude is None else nn.Parameter(factors.magnitude)

    def forward(self, weight: Tensor) -> Tensor:
        """The frozen weight -> the one that is computed with."""
        return effective_weight(weight, Factors(self.lora_A, self.lora_B, self.magnitude), self.scale, self.transposed)


def first_factors(name: str, weight: Tensor, rank: int, transposed: bool, with_norms: bool, seed: int) -> Factors:
    """Factors whose product is 0: a function of the seed and the name, of nothing else; as PEFT has them.

    A Linear's A is U(+-in^-1/2) and its B is 0; an embedding's B is N(0, 1) and its A is 0.
    """
    digest = hashlib.sha256(f"{seed}:{name}:low rank".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    size_out, size_in = weight.shape[::-1] if transposed else weight.shape
    A, B = torch.zeros(rank, size_in), torch.zeros(size_out, rank)
    if transposed:
        B.normal_(generator=generator)
    else:
        A.uniform_(-(size_in**-0.5), size_in**-0.5, generator=generator)
    norms = output_norms(weight, transposed) if with_norms else None
    return Factors(A.to(weight), B.to(weight), norms)
