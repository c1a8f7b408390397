"""What holds of every operator in every backend, whatever the lengths and boundaries."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambatrain.ops.backends import Backend, choose_backend

CPU = torch.device("cpu")
BACKENDS = [choose_backend(name, CPU) for name in ("torch", "reference")]
Arguments = dict[str, Tensor]
Scan = Callable[..., tuple[Tensor, Tensor]]

# Operator -> (the argument that carries on from before, the arguments along time, all sizes without R and L).
OPERATORS: dict[str, tuple[str, dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {
    "selective_scan": (
        "initial_state",
        {"u": (4,), "dt": (4,), "B": (3,), "C": (3,), "z": (4,)},
        {"A": (4, 3), "D": (4,), "dt_bias": (4,)},
    ),
    "ssd": (
        "initial_state",
        {"x": (4, 3), "dt": (4,), "B": (2, 5), "C": (2, 5)},
        {"A": (4,), "D": (4,), "dt_bias": (4,)},
    ),
    "causal_conv": ("initial_window", {"x": (4,)}, {"weight": (4, 4), "bias": (4,)}),
}
STATES = {"selective_scan": (4, 3), "ssd": (4, 3, 5), "causal_conv": (3, 4)}


def make_arguments(operator: str, rows: int, length: int) -> Arguments:
    _, along_time, fixed = OPERATORS[operator]
    generator = torch.Generator().manual_seed(length)
    sizes = {name: (rows, length, *size) for name, size in along_time.items()} | fixed
    made = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    return made | ({"A": -made["A"].exp()} if "A" in made else {})


def make_state(operator: str, rows: int) -> Tensor:
    return torch.randn(rows, *STATES[operator], generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def cut_time(operator: str, arguments: Arguments, span: slice) -> Arguments:
    along_time = OPERATORS[operator][1]
    return {name: tensor[:, span] if name in along_time else tensor for name, tensor in arguments.items()}


def mark(rows: int, length: int, starts: list[int]) -> Tensor:
    """(rows, length) bool; row r starts documents one position later than row r - 1."""
    boundaries = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        for start in starts:
            if start + row < length:
                boundaries[row, start + row] = True
    return boundaries


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


every_operator = pytest.mark.parametrize("operator", list(OPERATORS))
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)


@every_backend
@every_operator
@settings(max_examples=25)
@given(data=st.data(), length=st.integers(1, 150))
def test_cut_anywhere(backend: Backend, operator: str, data: st.DataObject, length: int) -> None:
    """scan(whole) == scan(head) then scan(tail, state), with every gradient through the state that is handed on."""
    cut = data.draw(st.integers(0, length), label="cut")
    starts = data.draw(st.lists(st.integers(0, length - 1), max_size=4), label="starts")
    scan: Scan = getattr(backend, operator)
    carried = OPERATORS[operator][0]
    arguments = make_arguments(operator, 2, length) | {carried: make_state(operator, 2)}
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    boundaries = mark(2, length, starts)

    whole = scan(**leaves, boundaries=boundaries)
    head, state = scan(**cut_time(operator, leaves, slice(cut)), boundaries=boundaries[:, :cut])
    rest = cut_time(operator, leaves, slice(cut, None)) | {carried: state}
    tail, last = scan(**rest, boundaries=boundaries[:, cut:])

    in_parts = (torch.cat([head, tail], dim=1), last)
    weights = [torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape) for out in whole]
    grads = [torch.autograd.grad(outputs, list(leaves.values()), weights) for outputs in (whole, in_parts)]
    for found, wanted in zip((*in_parts, *grads[1]), (*whole, *grads[0]), strict=True):
        assert_close(found, wanted)


@every_backend
@every_operator
@settings(max_examples=25)
@given(data=st.data(), lengths=st.lists(st.integers(1, 70), min_size=2, max_size=4))
def test_packed_equals_separate(backend: Backend, operator: str, data: st.DataObject, lengths: list[int]) -> None:
    """Documents side by side in one row give what each gives alone, and no gradient passes between them."""
    scan: Scan = getattr(backend, operator)
    carried, along_time, _ = OPERATORS[operator]
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    arguments = make_arguments(operator, 1, sum(lengths))
    leaves = {name: arguments[name].requires_grad_() for name in along_time}
    state = make_state(operator, 1).requires_grad_()
    packed, last = scan(**(arguments | leaves | {carried: state}), boundaries=mark(1, sum(lengths), starts))

    documents = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    for span in documents:
        alone, alone_last = scan(**cut_time(operator, arguments, span))
        assert_close(packed[:, span], alone)
    assert_close(last, alone_last)

    chosen = data.draw(st.integers(0, len(lengths) - 1), label="the document with a loss")
    outputs = [packed[:, documents[chosen]]] + ([last] if chosen == len(lengths) - 1 else [])
    grads = torch.autograd.grad([out.cos().sum() for out in outputs], [*leaves.values(), state])
    assert not grads[-1].any(), "the state before the first boundary"
    for grad in grads[:-1]:
        assert grad[:, documents[chosen]].any()
        grad[:, documents[chosen]] = 0
        assert not grad.any(), "another document's inputs"


@every_backend
@every_operator
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("start", [1, 16, 30, 64, 65])
def test_an_inf_does_not_cross_a_boundary(backend: Backend, operator: str, bad: float, start: int) -> None:
    scan: Scan = getattr(backend, operator)
    carried, along_time, _ = OPERATORS[operator]
    length = 70
    arguments = make_arguments(operator, 2, length) | {carried: make_state(operator, 2)}
    boundaries = torch.zeros(2, length, dtype=torch.bool)
    boundaries[:, start] = True
    clean, clean_last = scan(**arguments, boundaries=boundaries)
    for name in (*along_time, carried):
        spoilt = {key: tensor.clone() for key, tensor in arguments.items()}
        spoilt[name][0, 0 if name == carried else start - 1] = bad
        leaves = {key: spoilt[key].requires_grad_() for key in along_time}
        found, last = scan(**(spoilt | leaves), boundaries=boundaries)
        assert_close(found[:, start:], clean[:, start:])
        assert_close(found[1], clean[1])
        assert_close(last, clean_last)
        for grad in torch.autograd.grad(found[:, start:].sum() + last.sum(), list(leaves.values())):
            assert grad[:, start:].isfinite().all()


@every_backend
@every_operator
@pytest.mark.parametrize("value", [1.0, math.inf])
def test_a_boundary_at_0_discards_the_state_before(backend: Backend, operator: str, value: float) -> None:
    scan: Scan = getattr(backend, operator)
    carried = OPERATORS[operator][0]
    arguments = make_arguments(operator, 2, 20)
    state = torch.full_like(make_state(operator, 2), value).requires_grad_()
    boundaries = mark(2, 20, [0])
    boundaries[1, 0] = True
    out, last = scan(**arguments, boundaries=boundaries, **{carried: state})
    fresh, fresh_last = scan(**arguments, boundaries=boundaries)
    assert_close(out, fresh)
    assert_close(last, fresh_last)
    (grad,) = torch.autograd.grad(out.sum() + last.sum(), state)
    assert torch.equal(grad, torch.zeros_like(state))
