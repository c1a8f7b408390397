"""The self-check passes what is right and names what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mambatrain.errors import UserError
from mambatrain.ops.backends import Backend, choose_backend
from mambatrain.ops.self_check import SelfCheck, check_backend

CPU = torch.device("cpu")
TORCH = choose_backend("torch", CPU)
TOLERANCE = TORCH.tolerance


def broken(operator: str, argument: str, factor: float) -> Backend:
    """The torch backend, with the gradient of one argument of one operator wrong by a factor; its outputs are right."""
    right: Callable[..., tuple[Tensor, Tensor]] = getattr(TORCH, operator)

    def wrong(*positional: Any, **named: Any) -> tuple[Tensor, Tensor]:
        tensor = named[argument]
        named[argument] = tensor * factor - (tensor * (factor - 1)).detach()
        return right(*positional, **named)

    return dataclasses.replace(TORCH, **{operator: wrong})


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize(("block", "scan"), [("mamba1", "selective_scan"), ("mamba2", "ssd")])
def test_right_backends_pass(name: str, block: Literal["mamba1", "mamba2"], scan: str) -> None:
    check = check_backend(choose_backend(name, CPU), block, CPU)
    assert check.passed
    assert set(check.largest_errors) == {"causal_conv", scan, "softmax_loss"}
    assert all(0 < error < TOLERANCE / 10 for error in check.largest_errors.values())
    assert (check.backend, check.device, check.tolerance) == (name, "cpu", TOLERANCE)
    assert check.seconds > 0


@pytest.mark.parametrize(
    ("block", "operator", "arguments"),
    [
        ("mamba1", "causal_conv", ("x", "weight", "bias", "initial_window")),
        ("mamba1", "selective_scan", ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")),
        ("mamba2", "ssd", ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")),
    ],
)
def test_every_wrong_gradient_is_named(
    block: Literal["mamba1", "mamba2"], operator: str, arguments: tuple[str, ...]
) -> None:
    for argument in arguments:
        with pytest.raises(UserError, match=f"the gradient of {argument} of {operator} is"):
            check_backend(broken(operator, argument, 1.001), block, CPU)


@pytest.mark.parametrize("kind", ["boundaries", "nan", "shape", "state"])
def test_wrong_outputs_are_named(kind: str) -> None:
    def wrong(*positional: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if kind == "boundaries":
            named["boundaries"] = None
        out, state = TORCH.ssd(*positional, **named)
        changed = {"nan": out * float("nan"), "shape": out[:, 1:]}.get(kind, out)
        return changed, state * 1.01 if kind == "state" else state

    wanted = "the final state of ssd" if kind == "state" else "the output of ssd"
    with pytest.raises(UserError, match=wanted):
        check_backend(dataclasses.replace(TORCH, ssd=wrong), "mamba2", CPU)


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
@pytest.mark.parametrize("tensor", ["the losses", "the losses without gradients", "the gradient of logits"])
def test_a_wrong_loss_is_named(tensor: str, block: Literal["mamba1", "mamba2"]) -> None:
    def wrong(logits: Tensor, targets: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        losses, gradient = TORCH.softmax_loss(logits, targets, wants_gradient)
        if tensor == "the losses" or (tensor == "the losses without gradients" and not wants_gradient):
            losses = losses * 1.001
        if tensor == "the gradient of logits" and gradient is not None:
            gradient[:, -1] *= 0.9  # a column that no vector holds
        return losses, gradient

    with pytest.raises(UserError, match=f"{tensor} of softmax_loss is"):
        check_backend(dataclasses.replace(TORCH, softmax_loss=wrong), block, CPU)


def test_a_record_with_a_nan_has_not_passed() -> None:
    assert not SelfCheck("torch", "cpu", {"ssd": float("nan")}, TOLERANCE, 0.1).passed
    assert not SelfCheck("torch", "cpu", {"ssd": 2 * TOLERANCE}, TOLERANCE, 0.1).passed


def test_a_step_of_training_is_not_touched() -> None:
    """Neither the random state nor autocast reaches in or out."""
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert check_backend(TORCH, "mamba2", CPU).passed
    assert torch.equal(torch.get_rng_state(), before)
