"""What the fast Mamba-1 scan promises beyond its numbers: memory, linear work, views, bits, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mambatrain.ops.selective_scan import CHUNK, selective_scan

ROWS, CHANNELS, STATES = 2, 32, 16


class Watch(TorchDispatchMode):
    """Counts the elements that operations write, and keeps the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.written = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.written += result.numel()
            self.largest = max(self.largest, result.numel())
        return result


def make_arguments(length: int) -> dict[str, Tensor]:
    """As a block makes them: u and z halves of one projection, dt, B and C parts of another."""
    generator = torch.Generator().manual_seed(length)
    projected = torch.randn(ROWS, length, 2 * CHANNELS, generator=generator)
    mixed = torch.randn(ROWS, length, CHANNELS + 2 * STATES, generator=generator)
    u, z = projected.chunk(2, dim=-1)
    dt, B, C = mixed.split([CHANNELS, STATES, STATES], dim=-1)
    A = -torch.rand(STATES, CHANNELS, generator=generator).T - 0.1
    D, dt_bias = torch.randn(2, CHANNELS, generator=generator)
    state = torch.randn(ROWS, STATES, CHANNELS, generator=generator).transpose(1, 2)
    return {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "initial_state": state}


def run(arguments: dict[str, Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in arguments.values()]
    boundaries = torch.zeros(ROWS, arguments["u"].shape[1], dtype=torch.bool)
    boundaries[1, 20] = True
    out, state = selective_scan(**dict(zip(arguments, leaves, strict=True)), boundaries=boundaries)
    grads = torch.autograd.grad(out.float().square().sum() + state.sum(), leaves)
    return [out.detach(), state.detach(), *grads]


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_the_states_of_a_row_are_never_held() -> None:
    length = 32 * CHUNK
    with Watch() as watch:
        run(make_arguments(length))
    states = ROWS * length * CHANNELS * STATES
    assert watch.largest <= states / STATES * 2  # nothing above the inputs of the two projections


def test_work_is_linear_in_the_length() -> None:
    written = []
    for length in (16 * CHUNK, 32 * CHUNK):
        with Watch() as watch:
            run(make_arguments(length))
        written.append(watch.written)
    assert written[1] <= 2.01 * written[0]


def test_backward_keeps_inputs_and_entry_states_only() -> None:
    length = 8 * CHUNK
    arguments = {name: tensor.detach().requires_grad_() for name, tensor in make_arguments(length).items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        selective_scan(**arguments)
    ours = {tensor.untyped_storage().data_ptr() for tensor in arguments.values()}
    entries = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in ours]
    assert sum(tensor.numel() for tensor in entries) == length // CHUNK * ROWS * CHANNELS * STATES


def test_nothing_is_kept_without_a_gradient() -> None:
    arguments = {name: tensor.detach().requires_grad_() for name, tensor in make_arguments(4 * CHUNK).items()}
    with torch.no_grad(), Watch() as watch:
        out, _ = selective_scan(**arguments)
    with Watch() as training:
        selective_scan(**arguments)
    assert out.grad_fn is None
    assert training.written - watch.written == 4 * ROWS * CHANNELS * STATES  # the entry states


def test_strided_views_give_the_bits_of_contiguous_tensors() -> None:
    views = make_arguments(37)
    assert not any(views[name].is_contiguous() for name in ("u", "dt", "A", "B", "C", "z", "initial_state"))
    assert_same_bits(run(views), run({name: tensor.contiguous() for name, tensor in views.items()}))


def test_the_same_bits_twice_whatever_memory_held() -> None:
    arguments = make_arguments(70)
    wanted = run(arguments)
    try:
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        assert_same_bits(run(arguments), wanted)
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast_changes_nothing() -> None:
    arguments = make_arguments(37)
    wanted = run(arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(run(arguments), wanted)


def test_no_positions_hand_the_state_on() -> None:
    arguments = make_arguments(0)
    out, state = selective_scan(**arguments)
    assert out.shape == (ROWS, 0, CHANNELS)
    assert torch.equal(state, arguments["initial_state"])


@pytest.mark.parametrize("used", [0, 1], ids=["out", "state"])
def test_one_output_may_go_unused(used: int) -> None:
    arguments = {name: tensor.detach().double().requires_grad_() for name, tensor in make_arguments(20).items()}
    outputs = selective_scan(**arguments)
    zeroed = outputs[used].sum() + 0 * outputs[1 - used].sum()
    names = [name for name in arguments if used == 0 or name not in {"C", "D", "z"}]
    leaves = [arguments[name] for name in names]
    alone = torch.autograd.grad(outputs[used].sum(), leaves, retain_graph=True)
    assert_same_bits(list(alone), list(torch.autograd.grad(zeroed, leaves)))
