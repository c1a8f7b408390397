"""A backend against the reference on this very device, in a moment, before a run trusts it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mambatrain.errors import UserError
from mambatrain.ops import reference
from mambatrain.ops.backends import Backend

# Largest error over largest value. fp32 sums of this length differ by 1e-6; a wrong sign or a lost tail by 1e-1.
TOLERANCE = 1e-4
# Ragged, and longer than one chunk of any backend.
_ROWS, _LENGTH, _CHANNELS, _STATES, _HEADS, _WIDTH = 2, 83, 48, 16, 3, 4


@dataclass(frozen=True)
class SelfCheck:
    """What the comparison found."""

    errors: dict[str, float]
    """`operator.result` or `operator.gradient of argument` -> largest error relative to the largest value."""
    tolerance: float
    seconds: float
    passed: bool


def check_backend(backend: Backend, block: str, device: torch.device) -> SelfCheck:
    """Compares every operator of a block, forward and every gradient, with the reference in fp64.

    The inputs have boundaries (at the start, side by side, and across a chunk), an initial state and a ragged length.

    Args:
        backend: what will run.
        block: `mamba1` or `mamba2`.
        device: where it will run.

    Raises:
        UserError: naming the operator and the result or gradient that is off.
    """
    started = time.perf_counter()
    errors: dict[str, float] = {}
    scans = {"mamba1": ("selective_scan", _scan_inputs), "mamba2": ("ssd", _ssd_inputs)}
    scan, make_inputs = scans[block]
    for name, inputs in ((scan, make_inputs()), ("causal_conv", _conv_inputs())):
        errors |= _compare(name, getattr(backend, name), getattr(reference, name), inputs, device)
    # `not <=` so that a NaN counts as an error.
    for what, error in errors.items():
        if not error <= TOLERANCE:
            raise UserError(
                f"the {backend.name} kernels are wrong on this device: {what} is off by {error:.1e} of its largest "
                f"value (allowed: {TOLERANCE:.0e})",
                "use --kernels torch, and please report this with the output of `python -m torch.utils.collect_env`",
            )
    return SelfCheck(errors, TOLERANCE, time.perf_counter() - started, passed=True)


Inputs = dict[str, Tensor]


def _compare(
    name: str, ours: Callable[..., object], truth: Callable[..., object], inputs: Inputs, device: torch.device
) -> dict[str, float]:
    found = _results(ours, inputs, torch.float32, device)
    expected = _results(truth, inputs, torch.float64, torch.device("cpu"))
    return {
        f"{name}.{what}": float((found[what].cpu().double() - value).abs().max() / value.abs().max())
        for what, value in expected.items()
    }


def _results(operator: Callable[..., object], inputs: Inputs, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Both outputs, and the gradients of a fixed weighted sum of them."""
    arguments = {
        name: value.to(device) if value.dtype == torch.bool else value.to(device, dtype).requires_grad_()
        for name, value in inputs.items()
    }
    with torch.enable_grad():
        out, state = operator(**arguments)  # type: ignore[misc]
        total = (out * torch.linspace(-1, 1, out.numel()).to(out).view_as(out)).sum() + state.square().sum()
    leaves = {name: value for name, value in arguments.items() if value.requires_grad}
    gradients = torch.autograd.grad(total, list(leaves.values()))
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"output": out.detach(), "final state": state.detach(), **named}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240531)


def _boundaries() -> Tensor:
    boundaries = torch.zeros(_ROWS, _LENGTH, dtype=torch.bool)
    boundaries[0, 0] = boundaries[0, 31] = boundaries[0, 32] = boundaries[1, 64] = boundaries[1, 66] = True
    return boundaries


def _scan_inputs() -> Inputs:
    generator = _generator()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "u": normal(_ROWS, _LENGTH, _CHANNELS),
        "dt": normal(_ROWS, _LENGTH, _CHANNELS),
        "A": -torch.rand(_CHANNELS, _STATES, generator=generator, dtype=torch.float64) - 0.1,
        "B": normal(_ROWS, _LENGTH, _STATES),
        "C": normal(_ROWS, _LENGTH, _STATES),
        "D": normal(_CHANNELS),
        "z": normal(_ROWS, _LENGTH, _CHANNELS),
        "dt_bias": normal(_CHANNELS),
        "boundaries": _boundaries(),
        "initial_state": normal(_ROWS, _CHANNELS, _STATES),
    }


def _ssd_inputs() -> Inputs:
    generator = _generator()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head_dim = _CHANNELS // _HEADS
    return {
        "x": normal(_ROWS, _LENGTH, _HEADS, head_dim),
        "dt": normal(_ROWS, _LENGTH, _HEADS),
        "A": -torch.rand(_HEADS, generator=generator, dtype=torch.float64) - 0.1,
        "B": normal(_ROWS, _LENGTH, 1, _STATES),
        "C": normal(_ROWS, _LENGTH, 1, _STATES),
        "D": normal(_HEADS),
        "dt_bias": normal(_HEADS),
        "boundaries": _boundaries(),
        "initial_state": normal(_ROWS, _HEADS, head_dim, _STATES),
    }


def _conv_inputs() -> Inputs:
    generator = _generator()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(_ROWS, _LENGTH, _CHANNELS),
        "weight": normal(_CHANNELS, _WIDTH),
        "bias": normal(_CHANNELS),
        "boundaries": _boundaries(),
        "initial_window": normal(_ROWS, _WIDTH - 1, _CHANNELS),
    }
