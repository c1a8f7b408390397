"""Is what was written what was meant? Every tensor bit for bit, and the reader's logits against ours on fixed tokens.

Both are needed: the logits show that the reader computes with the tensors as we do, but an untrained `dt_proj` could be
wrong by a tenth before the logits moved by LARGEST_ALLOWED.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mambatrain.errors import UserError
from mambatrain.models.parameters import parameter_rows, stored_dtype
from mambatrain.ops.backends import choose_backend
from mambatrain.runs.weights import Weights, build_model, read_weights

NUM_TOKENS = 64
REPORT = "this is a mistake in mambatrain or a change in the reader; please report it with both versions"
LARGEST_ALLOWED = 1e-4
"""Of the largest logit, both computed in fp32. Rounding shows as 1e-6."""


def cast_weights(weights: Weights, dtype: torch.dtype) -> Weights:
    """The same weights, each a tensor of its own, in the dtype that they are stored in."""
    rows = parameter_rows(weights.section)
    tensors = {
        name: tensor.to(stored_dtype(rows[name], dtype), copy=True).contiguous()
        for name, tensor in weights.tensors.items()
    }
    return replace(weights, tensors=tensors)


def check_tensors(folder: Path, expected: Weights) -> None:
    """The folder's tensors are, bit for bit, what was to be written.

    Raises:
        UserError: naming one that is not.
    """
    written = read_weights(str(folder)).tensors
    for name, tensor in expected.tensors.items():
        if not torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)):  # as bytes: a NaN equals itself
            raise UserError(f"the export was not kept: {name} was not read back as it was to be written", REPORT)


def fixed_tokens(vocab_size: int) -> Tensor:
    """(1, NUM_TOKENS) ids below the vocabulary's size, the same for every call."""
    return torch.randint(0, vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def our_logits(weights: Weights) -> Tensor:
    """(1, NUM_TOKENS, V) fp32, on the CPU."""
    cpu = torch.device("cpu")
    model = build_model(weights, choose_backend("torch", cpu), cpu)
    logits: Tensor = model(fixed_tokens(weights.section.vocab_size))[0]
    return logits


def largest_difference(theirs: Tensor, ours: Tensor, reader: str) -> float:
    """Relative to the largest logit.

    Raises:
        UserError: it is above LARGEST_ALLOWED, or not a number.
    """
    if theirs.shape != ours.shape:
        raise UserError(f"{reader} gives logits of shape {tuple(theirs.shape)}, ours have {tuple(ours.shape)}", REPORT)
    difference = float((theirs - ours).abs().max() / ours.abs().max())
    if not difference <= LARGEST_ALLOWED:  # a NaN is not
        raise UserError(
            f"the export was not kept: {reader} reads it, but its logits differ from ours by {difference:.1e} of the "
            f"largest (allowed: {LARGEST_ALLOWED:.0e})",
            REPORT,
        )
    return difference
