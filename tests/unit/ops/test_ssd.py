"""What the fast Mamba-2 scan promises beyond its numbers: memory, linear work, views, bits, autocast."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from mambatrain.ops import reference
from mambatrain.ops.ssd import CHUNK, SEGMENT, ssd

ROWS, HEADS, HEAD_DIM, STATES = 2, 4, 8, 16


def make_arguments(length: int, groups: int = 1) -> dict[str, Tensor]:
    """As a block makes them: x, B, C and dt parts of one projection."""
    generator = torch.Generator().manual_seed(length)
    sizes = [HEADS * HEAD_DIM, groups * STATES, groups * STATES, HEADS]
    x, B, C, dt = torch.randn(ROWS, length, sum(sizes), generator=generator).split(sizes, dim=-1)
    A, D, dt_bias = -torch.rand(HEADS, generator=generator) - 0.1, *torch.randn(2, HEADS, generator=generator)
    return {
        "x": x.unflatten(-1, (HEADS, HEAD_DIM)),
        "dt": dt,
        "A": A,
        "B": B.unflatten(-1, (groups, STATES)),
        "C": C.unflatten(-1, (groups, STATES)),
        "D": D,
        "dt_bias": dt_bias,
        "initial_state": torch.randn(ROWS, HEADS, STATES, HEAD_DIM, generator=generator).transpose(2, 3),
    }


def run(arguments: dict[str, Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in arguments.values()]
    boundaries = torch.zeros(ROWS, arguments["x"].shape[1], dtype=torch.bool)
    boundaries[1, 20] = True
    y, state = ssd(**dict(zip(arguments, leaves, strict=True)), boundaries=boundaries)
    grads = torch.autograd.grad(y.float().square().sum() + state.sum(), leaves)
    return [y.detach(), state.detach(), *grads]


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_backward_keeps_inputs_and_entry_states_only() -> None:
    length = 3 * CHUNK + 1
    arguments = {name: tensor.detach().requires_grad_() for name, tensor in make_arguments(length).items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ssd(**arguments)
    ours = {tensor.untyped_storage().data_ptr() for tensor in arguments.values()}
    entries = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in ours]
    assert sum(tensor.numel() for tensor in entries) == 4 * ROWS * HEADS * HEAD_DIM * STATES


@pytest.mark.parametrize("length", [37, SEGMENT + CHUNK + 3])
def test_strided_views_give_the_bits_of_contiguous_tensors(length: int) -> None:
    views = make_arguments(length, groups=2)
    assert not any(views[name].is_contiguous() for name in ("x", "dt", "B", "C", "initial_state"))
    assert_same_bits(run(views), run({name: tensor.contiguous() for name, tensor in views.items()}))


def test_the_same_bits_twice_whatever_memory_held() -> None:
    arguments = make_arguments(SEGMENT + CHUNK + 3)
    wanted = run(arguments)
    try:
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        assert_same_bits(run(arguments), wanted)
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast_changes_nothing() -> None:
    arguments = make_arguments(70)
    wanted = run(arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(run(arguments), wanted)


@pytest.mark.parametrize("large", [200.0, 1e20])
def test_long_decays_do_not_blur_short_ones(large: float) -> None:
    """Exponents of -200 and -1e20 at 32 positions, then decays near 1 in the next document of the same chunk."""
    arguments = make_arguments(CHUNK)
    half = CHUNK // 2
    dt = torch.full((ROWS, CHUNK, HEADS), -5.0)
    dt[:, :half] = large
    arguments |= {"dt": dt, "A": torch.full((HEADS,), -1.0), "dt_bias": torch.zeros(HEADS)}
    boundaries = torch.zeros(ROWS, CHUNK, dtype=torch.bool)
    boundaries[:, half] = True
    truth, _ = reference.ssd(**{name: tensor.double() for name, tensor in arguments.items()}, boundaries=boundaries)
    errors = [
        (form(**arguments, boundaries=boundaries)[0] - truth)[:, half:].abs().max() for form in (ssd, reference.ssd)
    ]
    assert errors[0] <= 2 * errors[1]


def test_no_positions_hand_the_state_on() -> None:
    arguments = make_arguments(0)
    y, state = ssd(**arguments)
    assert y.shape == (ROWS, 0, HEADS, HEAD_DIM)
    assert torch.equal(state, arguments["initial_state"])


def test_nothing_is_kept_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr(FunctionCtx, "save_for_backward", lambda ctx, *tensors: kept.append(len(tensors)))
    arguments = {name: tensor.detach().requires_grad_() for name, tensor in make_arguments(CHUNK + 1).items()}
    ssd(**arguments)
    with torch.no_grad():
        ssd(**arguments)
    assert kept == [9 + 2, 9]  # the arguments; entry states of two segments


def test_a_state_that_overflowed_stops_at_a_boundary() -> None:
    """Finite inputs, a state of inf at the entry of the chunk in which the next document starts."""
    start = CHUNK + 10
    boundaries = torch.zeros(ROWS, 2 * CHUNK, dtype=torch.bool)
    boundaries[:, start] = True
    results = []
    for scale in (1.0, 1e20):
        arguments = make_arguments(2 * CHUNK)
        for name in ("x", "B"):
            arguments[name] = arguments[name].clone()
            arguments[name][:, :CHUNK] *= scale
        leaves = [arguments[name].requires_grad_() for name in ("x", "dt", "B", "C")]
        y, state = ssd(**arguments, boundaries=boundaries)
        assert y[:, :CHUNK].isfinite().all() == (scale == 1.0)
        grads = torch.autograd.grad(y[:, start:].sum() + state.sum(), leaves)
        results.append([y[:, start:], state, *(grad[:, start:] for grad in grads)])
    for found, wanted in zip(*reversed(results), strict=True):
        assert torch.equal(found, wanted)


def test_an_inf_inside_its_own_document_is_not_hidden() -> None:
    arguments = make_arguments(20)
    arguments["x"] = arguments["x"].clone()
    arguments["x"][0, 5] = math.inf
    boundaries = torch.zeros(ROWS, 20, dtype=torch.bool)
    boundaries[:, 10] = True
    y, _ = ssd(**arguments, boundaries=boundaries)
    assert not y[0, 5:10].isfinite().any()
    assert y[:, 10:].isfinite().all()
    assert y[0, :5].isfinite().all()
