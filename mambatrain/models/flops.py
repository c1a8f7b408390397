"""What a model costs, from its recipe alone: parameters by part, floating-point operations per token by term.

Transformers' 6 x parameters (+ attention) does not fit state-space models: there is no attention, the scan costs time
but has hardly any parameters, and an untied embedding is only looked up. Here a multiply-add is 2 operations, an
exponential 1, and what the mathematics needs is counted, however a backend computes it. Norms, SiLU, softplus and
residual additions (below 1%) are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from mambatrain.models.parameters import conv_channels, parameter_shapes

if TYPE_CHECKING:
    from mambatrain.recipe import ModelSection

# Mamba-2's scan is counted in its chunked form, whose cost depends on the chunk; this is the torch backend's.
SSD_CHUNK_TOKENS = 64
# The gradient of a product of two matrices takes two products of the same size.
BACKWARD_OVER_FORWARD = 2


def count_parameters(section: ModelSection) -> dict[str, int]:
    """Parameters of the embedding, the mixers, the norms, the head (0 where it is the embedding), and in total."""
    counts = Counter({"embedding": 0, "mixers": 0, "norms": 0, "head": 0})
    for name, shape in parameter_shapes(section).items():
        if ".mixer." in name:
            part = "mixers"
        else:
            part = {"embedding.weight": "embedding", "lm_head.weight": "head"}.get(name, "norms")
        counts[part] += math.prod(shape)
    return {**counts, "total": counts.total()}


def forward_flops_per_token(section: ModelSection, row_tokens: int) -> dict[str, int]:
    """Operations of one token's forward pass by term: the layers' terms over all layers, and the head once.

    Everything is linear in the length; `row_tokens`, the tokens of a row, matters to a Mamba-2 whose rows are shorter
    than a chunk.

    projections: every Linear of the block, 2 x in x out each. (Mamba-1: in, x, dt and out; Mamba-2: in and out.)
    convolution: W multiply-adds per channel.
    scan: see `_selective_scan_flops` and `_ssd_flops`.
    head: d_model x padded vocabulary, tied or not. The embedding is a lookup and costs nothing.
    """
    D, E = section.d_model, section.d_inner
    if section.block == "mamba1":
        N, R = section.state_size, section.dt_rank_size
        weights = D * 2 * E + E * (R + 2 * N) + R * E + E * D
        channels, scan = E, _selective_scan_flops(section)
    else:
        channels = conv_channels(section)
        weights = D * (E + channels + section.num_heads) + E * D
        scan = _ssd_flops(section, min(row_tokens, SSD_CHUNK_TOKENS))
    return {
        "projections": section.num_layers * 2 * weights,
        "convolution": section.num_layers * 2 * section.d_conv * channels,
        "scan": section.num_layers * scan,
        "head": 2 * D * section.padded_vocab_size,
    }


def training_flops_per_token(section: ModelSection, row_tokens: int) -> int:
    """Operations of one token in a training step: forward, and backward at twice that.

    These are model FLOPs, not hardware FLOPs: what activation checkpointing computes again is not progress.
    """
    return (1 + BACKWARD_OVER_FORWARD) * sum(forward_flops_per_token(section, row_tokens).values())


def _selective_scan_flops(section: ModelSection) -> int:
    """Mamba-1's recurrence, per token and layer.

    For each of the E x N states: dt A, its exponential, the decay of h, (dt u) B, their sum, and C h added up: 7.
    For each of the E channels: dt u, D u added, the gate: 4.
    """
    return 7 * section.d_inner * section.state_size + 4 * section.d_inner


def _ssd_flops(section: ModelSection, Q: int) -> int:
    """Mamba-2's scan in chunks of Q tokens (arXiv 2405.21060, section 6), per token and layer.

    Within the chunk a token reads itself and what is before it, (Q + 1) / 2 positions on average:
    C B^T once per group (2 N each); per head the decay, its exponential, their product (3) and that with x (2 P).
    Across chunks, per head: the token's part of the chunk's state (2 P N), what the state before gives it (2 P N), and
    the chunk's step of the state (2 P N, shared by Q tokens). D x: 2 P. dt x: P.
    """
    H, P, N, G = section.num_heads, section.head_dim, section.state_size, section.num_groups
    within = (Q + 1) * (2 * N * G + (3 + 2 * P) * H) // 2
    across = H * (4 * P * N + 2 * P * N // Q)
    return within + across + 3 * P * H
