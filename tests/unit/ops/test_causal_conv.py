"""What the fast convolution promises beyond its numbers: what it keeps, views, bits, autocast, the window."""

from __future__ import annotations

import torch
from torch import Tensor

from mambatrain.ops.causal_conv import causal_conv

ROWS, CHANNELS, WIDTH = 2, 8, 4


def make_arguments(length: int) -> dict[str, Tensor]:
    """x is half of a projection, as in a block."""
    generator = torch.Generator().manual_seed(length)
    x, _ = torch.randn(ROWS, length, 2 * CHANNELS, generator=generator).chunk(2, dim=-1)
    return {
        "x": x,
        "weight": torch.randn(WIDTH, CHANNELS, generator=generator).T,
        "bias": torch.randn(CHANNELS, generator=generator),
        "initial_window": torch.randn(ROWS, CHANNELS, WIDTH - 1, generator=generator).transpose(1, 2),
    }


def run(arguments: dict[str, Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in arguments.values()]
    boundaries = torch.zeros(ROWS, arguments["x"].shape[1], dtype=torch.bool)
    boundaries[1, 20:22] = True
    y, window = causal_conv(**dict(zip(arguments, leaves, strict=True)), boundaries=boundaries)
    return [y.detach(), window.detach(), *torch.autograd.grad(y.square().sum() + window.square().sum(), leaves)]


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_backward_keeps_inputs_only() -> None:
    arguments = {name: tensor.detach().requires_grad_() for name, tensor in make_arguments(30).items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        causal_conv(**arguments)
    ours = {tensor.untyped_storage().data_ptr() for tensor in arguments.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= ours


def test_strided_views_give_the_bits_of_contiguous_tensors() -> None:
    views = make_arguments(37)
    assert not any(views[name].is_contiguous() for name in ("x", "weight", "initial_window"))
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


def test_the_window_holds_the_last_inputs_and_zeros_before_a_boundary() -> None:
    arguments = make_arguments(6)
    boundaries = torch.zeros(ROWS, 6, dtype=torch.bool)
    boundaries[1, 4] = True
    _, window = causal_conv(**arguments, boundaries=boundaries)
    assert torch.equal(window[0], arguments["x"][0, 3:])
    assert torch.equal(window[1, 0], torch.zeros(CHANNELS))
    assert torch.equal(window[1, 1:], arguments["x"][1, 4:])


def test_a_row_shorter_than_the_window_keeps_part_of_the_old_one() -> None:
    arguments = make_arguments(1)
    _, window = causal_conv(**arguments)
    assert torch.equal(window, torch.cat([arguments["initial_window"][:, 1:], arguments["x"]], dim=1))


def test_the_window_does_not_hold_the_row_in_memory() -> None:
    _, window = causal_conv(**make_arguments(1000))
    assert window.untyped_storage().nbytes() == ROWS * (WIDTH - 1) * CHANNELS * 4


def test_no_positions_hand_the_window_on() -> None:
    arguments = make_arguments(0)
    y, window = causal_conv(**arguments, boundaries=torch.zeros(ROWS, 0, dtype=torch.bool))
    assert y.shape == (ROWS, 0, CHANNELS)
    assert torch.equal(window, arguments["initial_window"])
