"""Chunked cross-entropy: the reference's numbers without its (T, V)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mambatrain.ops import reference
from mambatrain.ops.cross_entropy import CHUNK, chunked_cross_entropy

WIDTH, VOCABULARY = 16, 50


def make_arguments(positions: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(positions)
    hidden = 2 * torch.randn(positions, WIDTH, generator=generator, dtype=dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype)
    targets = torch.randint(0, VOCABULARY, (positions,), generator=generator)
    targets[::3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("positions", [1, 2, CHUNK - 1, CHUNK, 2 * CHUNK + 7, 5 * CHUNK])
def test_loss_and_gradients_equal_the_reference(positions: int) -> None:
    hidden, weight, targets = make_arguments(positions)
    found, wanted = chunked_cross_entropy(hidden, weight, targets), reference.cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(0.3 * loss, (hidden, weight)) for loss in (found, wanted)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, targets = make_arguments(7)
    assert torch.autograd.gradcheck(lambda *leaves: chunked_cross_entropy(*leaves, targets), (hidden, weight))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_ignored_positions_have_no_part(bad: float) -> None:
    hidden, weight, targets = make_arguments(600)
    ignored = targets == -100
    wanted = chunked_cross_entropy(hidden, weight, targets)
    spoilt = torch.where(ignored[:, None], bad, hidden.detach()).requires_grad_()
    found = chunked_cross_entropy(spoilt, weight, targets)
    assert torch.equal(found, wanted)
    dhidden, dweight = torch.autograd.grad(found, (spoilt, weight))
    assert torch.equal(dhidden[ignored], torch.zeros_like(dhidden[ignored]))
    assert dhidden[~ignored].any(dim=1).all()
    assert torch.equal(dweight, torch.autograd.grad(wanted, weight)[0])


def test_nothing_counts() -> None:
    hidden, weight, targets = make_arguments(10)
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    assert loss.item() == 0.0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("wanting", [(True, False), (False, True)], ids=["hidden", "weight"])
def test_one_of_the_two_may_want_a_gradient(wanting: tuple[bool, bool]) -> None:
    hidden, weight, targets = make_arguments(300)
    both = torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets), (hidden, weight))
    hidden, weight = hidden.detach().requires_grad_(wanting[0]), weight.detach().requires_grad_(wanting[1])
    leaf, wanted = (hidden, both[0]) if wanting[0] else (weight, both[1])
    (grad,) = torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets), leaf)
    assert torch.equal(grad, wanted)


def test_a_tied_weight_gets_both_its_gradients() -> None:
    _, weight, targets = make_arguments(300)
    tokens = torch.arange(300) % VOCABULARY
    grads = [
        torch.autograd.grad(form(weight[tokens], weight, targets), weight)[0]
        for form in (chunked_cross_entropy, reference.cross_entropy)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def test_large_logits_and_improbable_targets() -> None:
    weight = torch.eye(3, dtype=torch.float64, requires_grad=True)
    hidden = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([2, 1]))
    assert loss.item() == 2e4
    assert torch.autograd.grad(loss, hidden)[0].tolist() == [[1, 0, -1], [0, 0, 0]]


class Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += "mm" in func.__name__
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_the_logits_are_never_held() -> None:
    hidden, weight, targets = make_arguments(8 * CHUNK)
    with Largest() as seen:
        chunked_cross_entropy(hidden, weight, targets).backward()
    assert seen.numel <= max(CHUNK * VOCABULARY, hidden.numel())
    assert seen.numel < targets.numel() * VOCABULARY / 2


def test_no_gradients_are_made_that_nobody_wants() -> None:
    hidden, weight, targets = make_arguments(CHUNK)
    with Largest() as wanted:
        loss = chunked_cross_entropy(hidden, weight, targets)
    with torch.no_grad(), Largest() as seen:
        alone = chunked_cross_entropy(hidden, weight, targets)
    assert (wanted.products, seen.products) == (3, 1)
    assert torch.equal(alone, loss)


@pytest.mark.parametrize("autocast", [False, True])
def test_error_is_at_most_twice_that_of_full_logits(autocast: bool) -> None:
    hidden, weight, targets = make_arguments(700, torch.float32)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth_loss = reference.cross_entropy(*exact, targets)
    truth = (truth_loss, *torch.autograd.grad(truth_loss, exact))
    results = []
    for chunked in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            full = F.linear(hidden, weight) if not chunked else None
            loss = (
                chunked_cross_entropy(hidden, weight, targets)
                if full is None
                else F.cross_entropy(full.float(), targets, reduction="sum")
            )
        assert loss.dtype == torch.float32
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for found, plain, wanted in zip(*results, truth, strict=True):
        assert found.dtype == plain.dtype
        floor = torch.finfo(torch.float32).eps * wanted.abs().max()
        assert (found - wanted).abs().max() <= max(2 * (plain - wanted).abs().max(), floor)


def test_autocast_multiplies_in_its_dtype() -> None:
    hidden, weight, targets = make_arguments(300, torch.float32)
    products: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mm" in func.__name__:
                products.extend(arg.dtype for arg in args if isinstance(arg, Tensor))
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Watch():
        chunked_cross_entropy(hidden, weight, targets)
    assert set(products) == {torch.bfloat16}
