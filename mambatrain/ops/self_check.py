"""A proof that a backend computes on this device what the reference says: a second of it before step 1, all of it when
`kernels check` asks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mambatrain.errors import UserError
from mambatrain.ops import reference
from mambatrain.ops.backends import Backend
from mambatrain.ops.cross_entropy import CHUNK, SoftmaxLoss

SPAN = 64  # positions whose states the reference keeps at once, of a long row

Operator = Callable[..., tuple[Tensor, Tensor]]
Block = Literal["mamba1", "mamba2"]

SHAPES: dict[str, dict[str, str]] = {
    "causal_conv": {"x": "RLC", "weight": "CW", "bias": "C", "initial_window": "RVC"},
    "selective_scan": {
        **dict.fromkeys(("u", "dt", "z"), "RLC"),
        **dict.fromkeys(("B", "C"), "RLN"),
        **dict.fromkeys(("D", "dt_bias"), "C"),
        "A": "CN",
        "initial_state": "RCN",
    },
    "ssd": {
        "x": "RLHP",
        "dt": "RLH",
        "initial_state": "RHPN",
        **dict.fromkeys(("B", "C"), "RLGN"),
        **dict.fromkeys(("A", "D", "dt_bias"), "H"),
    },
    "softmax_loss": {"logits": "TK"},
}
"""Operator -> argument -> its dimensions, by the letters of `Sizes`; the loss has its integers besides."""


@dataclass(frozen=True)
class Sizes:
    """What the letters of `SHAPES` stand for."""

    R: int = 2
    """Rows."""
    L: int = 77
    """Positions; no multiple of a chunk here."""
    C: int = 12
    """Channels of the convolution and of Mamba-1's scan."""
    W: int = 4
    """Taps."""
    N: int = 16
    """States."""
    H: int = 4
    """Heads, of P channels, in G groups."""
    P: int = 8
    G: int = 2
    K: int = 517
    """Logits of a position; no multiple of any vectors here."""

    def of(self, dimensions: str) -> list[int]:
        """The shape behind the letters; V is W - 1, T the positions whose logits there are at once."""
        letters = asdict(self) | {"V": self.W - 1, "T": min(CHUNK, self.R * self.L)}
        return [letters[letter] for letter in dimensions]


@dataclass(frozen=True)
class SelfCheck:
    """What a check found; `check_backend` raises instead of returning one that did not pass."""

    backend: str
    device: str
    largest_errors: dict[str, float]
    """Operator -> largest error of its outputs and gradients, relative to the largest value of the tensor."""
    tolerance: float
    seconds: float

    @property
    def passed(self) -> bool:
        return all(error <= self.tolerance for error in self.largest_errors.values())


@dataclass(frozen=True)
class Comparison:
    """One output or gradient of one operator."""

    operator: str
    dtype: torch.dtype
    tensor: str
    error: float
    """The largest, relative to the largest value."""
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # a NaN is no pass


def check_backend(backend: Backend, block: Block, device: torch.device) -> SelfCheck:
    """Compares the operators of a block, and every gradient, with the reference in fp64.

    The inputs are small and random, of a ragged length, with boundaries and a state before position 0.

    Raises:
        UserError: naming the operator and the output or gradient that is wrong.
    """
    began = time.perf_counter()
    sizes, generator = Sizes(), torch.Generator().manual_seed(0)
    boundaries = _boundaries(sizes)
    largest_errors = {}
    for name in _operators_of(block):
        arguments = _random_arguments(name, sizes, generator)
        found = _run(name, getattr(backend, name), _moved(arguments, device), boundaries.to(device))
        wanted = _run(name, getattr(reference, name), arguments, boundaries)
        errors = {tensor: _relative_error(found[tensor], wanted[tensor].to(device)) for tensor in wanted}
        for tensor, error in errors.items():
            if not error <= backend.tolerance:  # a NaN is no pass
                raise UserError(
                    f"the {backend.name} backend is wrong on {device}: {tensor} of {name} is {error:.1e} away from "
                    f"the reference (allowed: {backend.tolerance:.0e})",
                    "--kernels reference is slow but right; report this with the versions of mambatrain and torch",
                )
        largest_errors[name] = max(errors.values())
    return SelfCheck(backend.name, str(device), largest_errors, backend.tolerance, time.perf_counter() - began)


def compare_backend(
    backend: Backend, block: Block, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Iterator[Comparison]:
    """The operators of a block at any size against the reference in fp64, all on the device.

    What has a length is of the dtype, parameters and states are fp32. An error may be twice that which the reference
    makes in the same dtype, and 16 roundings of fp32 more; of a parameter's gradient, whose many terms of random sign
    may cancel, roundings of what they come to.
    """
    boundaries = _boundaries(sizes).to(device)
    for name in _operators_of(block):
        arguments = _moved(_random_arguments(name, sizes, torch.Generator().manual_seed(0)), device)
        for argument, dimensions in SHAPES[name].items():
            if {"L", "T"}.intersection(dimensions):
                arguments[argument] = arguments[argument].to(dtype)
        plain = reference.softmax_loss if name == "softmax_loss" else _in_spans(name)
        wanted = _run(name, plain, _in(torch.float64, arguments), boundaries)
        theirs = _run(name, plain, arguments, boundaries)
        found = _run(name, getattr(backend, name), arguments, boundaries)
        num_updates = wanted["the final state"].numel() * sizes.L if "the final state" in wanted else 0
        for tensor, truth in wanted.items():
            num_terms = 0.0 if truth.dim() > 2 else num_updates / truth.numel()
            scale = max(float(truth.abs().max()), num_terms**0.5) / float(truth.abs().max())
            allowed = 2 * _relative_error(theirs[tensor], truth) + 16 * torch.finfo(torch.float32).eps * scale
            yield Comparison(name, dtype, tensor, _relative_error(found[tensor], truth), allowed)


def _operators_of(block: Block) -> tuple[str, ...]:
    return ("causal_conv", "selective_scan" if block == "mamba1" else "ssd", "softmax_loss")


def _random_arguments(name: str, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """In fp64, on the CPU."""
    arguments = {
        argument: torch.randn(sizes.of(dimensions), generator=generator, dtype=torch.float64)
        for argument, dimensions in SHAPES[name].items()
    }
    if "A" in arguments:
        arguments["A"], arguments["dt_bias"] = -arguments["A"].exp(), arguments["dt_bias"] - 3
    if name == "softmax_loss":
        rows, columns = arguments["logits"].shape
        arguments["targets"] = torch.randint(0, columns, (rows,), generator=generator)
    return arguments


def _moved(arguments: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in _in(torch.float32, arguments).items()}


def _in(dtype: torch.dtype, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the integers."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in arguments.items()}


def _boundaries(sizes: Sizes) -> Tensor:
    """(R, L): on the edges of chunks of any size, beside them, next to each other, and at 0."""
    edges = [1 << power for power in range(6, 20)]
    boundaries = torch.zeros(sizes.R, sizes.L, dtype=torch.bool)
    for row, places in enumerate(([16, 17, *edges], [0, 40, *(edge - 1 for edge in edges[1:])])):
        boundaries[row, [place for place in places if place < sizes.L]] = True
    return boundaries


def _run(name: str, operator: Any, arguments: dict[str, Tensor], boundaries: Tensor) -> dict[str, Tensor]:
    """The outputs, and the gradients of one fixed random weighting of them, in fp64."""
    if name == "softmax_loss":
        return _run_softmax_loss(operator, **arguments)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    with torch.enable_grad(), torch.autocast(boundaries.device.type, enabled=False):
        outputs = operator(**leaves, boundaries=boundaries)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
    named = {"the output": outputs[0], "the final state": outputs[1]}
    named |= {f"the gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor.detach().double() for name, tensor in named.items()}


def _run_softmax_loss(softmax_loss: SoftmaxLoss, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What training and evaluation take of it, in fp64; of copies, because the gradients may replace the logits."""
    losses, gradient = softmax_loss(logits.clone(), targets, True)
    alone, _ = softmax_loss(logits.clone(), targets, False)
    gradient = torch.zeros(0) if gradient is None else gradient
    named = {"the losses": losses, "the losses without gradients": alone, "the gradient of logits": gradient}
    return {name: tensor.double() for name, tensor in named.items()}


def _in_spans(name: str) -> Operator:
    """The reference, span after span, so that a long row takes no more memory than its states at the spans' edges."""
    from torch.utils.checkpoint import checkpoint

    operator: Any = getattr(reference, name)
    carried = "initial_window" if name == "causal_conv" else "initial_state"
    along = [argument for argument, dimensions in SHAPES[name].items() if "L" in dimensions]

    def run(*, boundaries: Tensor, **arguments: Tensor) -> tuple[Tensor, Tensor]:
        spans = zip(
            *(torch.split(tensor, SPAN, 1) for tensor in (boundaries, *(arguments[one] for one in along))), strict=True
        )
        fixed = {key: tensor for key, tensor in arguments.items() if key not in (carried, *along)}
        state, outputs = arguments[carried], []
        for starts, *pieces in spans:
            given = fixed | dict(zip(along, pieces, strict=True)) | {carried: state, "boundaries": starts}
            out, state = checkpoint(operator, use_reentrant=False, preserve_rng_state=False, **given)
            outputs.append(out)
        return torch.cat(outputs, dim=1), state

    return run


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return math.inf
    return float((found - wanted).abs().max() / wanted.abs().max())
