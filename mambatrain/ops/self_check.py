"""A second's proof, before step 1, that a backend computes on this device what the reference says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mambatrain.errors import UserError
from mambatrain.ops import reference
from mambatrain.ops.backends import Backend

# Of the largest value of the tensor compared. fp32 rounding gives 1e-6 on these inputs; a wrong boundary, a lost term,
# products in TF32 or bf16 give 1e-3 and more.
TOLERANCE = 1e-4

LENGTH = 77  # no multiple of a chunk
ROWS = 2

Operator = Callable[..., tuple[Tensor, Tensor]]


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


def check_backend(backend: Backend, block: Literal["mamba1", "mamba2"], device: torch.device) -> SelfCheck:
    """Compares the operators of a block, and every gradient, with the reference in fp64.

    The inputs are small and random, of a ragged length, with boundaries and a state before position 0.

    Raises:
        UserError: naming the operator and the output or gradient that is wrong.
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    checks: dict[str, tuple[Operator, Operator, dict[str, Tensor]]] = {
        "causal_conv": (backend.causal_conv, reference.causal_conv, _conv_arguments(generator))
    }
    if block == "mamba1":
        arguments = _selective_scan_arguments(generator)
        checks["selective_scan"] = (backend.selective_scan, reference.selective_scan, arguments)
    else:
        checks["ssd"] = (backend.ssd, reference.ssd, _ssd_arguments(generator))
    largest_errors = {}
    for operator, (ours, theirs, arguments) in checks.items():
        errors = _compare(ours, theirs, arguments, device)
        for tensor, error in errors.items():
            if not error <= TOLERANCE:  # a NaN is no pass
                raise UserError(
                    f"the {backend.name} backend is wrong on {device}: {tensor} of {operator} is {error:.1e} away from "
                    f"the reference (allowed: {TOLERANCE:.0e})",
                    "--kernels reference is slow but right; report this with the versions of mambatrain and torch",
                )
        largest_errors[operator] = max(errors.values())
    return SelfCheck(backend.name, str(device), largest_errors, TOLERANCE, time.perf_counter() - began)


def _compare(ours: Operator, theirs: Operator, arguments: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """Output or gradient -> its error relative to its largest value."""
    found = _run(ours, {name: tensor.to(device, torch.float32) for name, tensor in arguments.items()})
    wanted = _run(theirs, arguments)
    return {name: _relative_error(found[name], wanted[name]) for name in wanted}


def _run(operator: Operator, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, and the gradients of one fixed random weighting of them, on the CPU in fp64."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    first = next(iter(leaves.values()))
    boundaries = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    boundaries[0, [16, 17, 64]] = True  # on the edges of chunks, and next to each other
    boundaries[1, [0, 40]] = True  # at 0 the state before is discarded
    with torch.enable_grad():
        outputs = operator(**leaves, boundaries=boundaries.to(first.device))
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
    named = {"the output": outputs[0], "the final state": outputs[1]}
    named |= {f"the gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor.detach().double().cpu() for name, tensor in named.items()}


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return math.inf
    return float((found - wanted).abs().max() / wanted.abs().max())


def _conv_arguments(generator: torch.Generator) -> dict[str, Tensor]:
    channels, width = 12, 4
    return _random(
        generator,
        x=(ROWS, LENGTH, channels),
        weight=(channels, width),
        bias=(channels,),
        initial_window=(ROWS, width - 1, channels),
    )


def _selective_scan_arguments(generator: torch.Generator) -> dict[str, Tensor]:
    channels, states = 12, 16
    arguments = _random(
        generator,
        u=(ROWS, LENGTH, channels),
        dt=(ROWS, LENGTH, channels),
        A=(channels, states),
        B=(ROWS, LENGTH, states),
        C=(ROWS, LENGTH, states),
        D=(channels,),
        z=(ROWS, LENGTH, channels),
        dt_bias=(channels,),
        initial_state=(ROWS, channels, states),
    )
    return arguments | {"A": -arguments["A"].exp(), "dt_bias": arguments["dt_bias"] - 3}


def _ssd_arguments(generator: torch.Generator) -> dict[str, Tensor]:
    heads, head_dim, groups, states = 4, 8, 2, 16
    arguments = _random(
        generator,
        x=(ROWS, LENGTH, heads, head_dim),
        dt=(ROWS, LENGTH, heads),
        A=(heads,),
        B=(ROWS, LENGTH, groups, states),
        C=(ROWS, LENGTH, groups, states),
        D=(heads,),
        dt_bias=(heads,),
        initial_state=(ROWS, heads, head_dim, states),
    )
    return arguments | {"A": -arguments["A"].exp(), "dt_bias": arguments["dt_bias"] - 3}


def _random(generator: torch.Generator, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
