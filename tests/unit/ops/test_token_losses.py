"""Losses of single targets: the plain form's numbers and gradients without its (T, V)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambatrain.ops.backends import choose_backend
from mambatrain.ops.cross_entropy import CHUNK, chunked_cross_entropy
from mambatrain.ops.token_losses import chunked_token_losses

WIDTH, VOCABULARY = 16, 50


def make_arguments(positions: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(positions)
    hidden = 2 * torch.randn(positions, WIDTH, generator=generator, dtype=dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype)
    targets = torch.randint(0, VOCABULARY, (positions,), generator=generator)
    targets[::3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("positions", [1, 2, CHUNK - 1, 2 * CHUNK + 7])
def test_each_loss_and_its_gradient_are_those_of_the_plain_form(positions: int) -> None:
    hidden, weight, targets = make_arguments(positions)
    found = chunked_token_losses(hidden, weight, targets)
    wanted = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1.0, 2.0, positions, dtype=torch.float64)  # of each loss, known behind forward alone
    grads = [torch.autograd.grad((weights * losses).sum(), (hidden, weight)) for losses in (found, wanted)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, targets = make_arguments(7)
    assert torch.autograd.gradcheck(lambda *leaves: chunked_token_losses(*leaves, targets), (hidden, weight))


def test_ignored_positions_have_no_part() -> None:
    hidden, weight, targets = make_arguments(600)
    ignored = targets == -100
    spoilt = torch.where(ignored[:, None], math.nan, hidden.detach()).requires_grad_()
    losses = chunked_token_losses(spoilt, weight, targets)
    assert torch.equal(losses, chunked_token_losses(hidden, weight, targets))
    assert not losses[ignored].any() and bool((losses[~ignored] > 0).all())
    (dhidden,) = torch.autograd.grad(losses.sum(), spoilt)
    assert not dhidden[ignored].any() and dhidden[~ignored].any(dim=1).all()


def test_what_is_frozen_has_no_gradient() -> None:
    hidden, weight, targets = make_arguments(9)
    (dhidden,) = torch.autograd.grad(chunked_token_losses(hidden, weight.detach(), targets).sum(), hidden)
    assert torch.equal(dhidden, torch.autograd.grad(chunked_token_losses(hidden, weight, targets).sum(), hidden)[0])


@pytest.mark.parametrize("kernels", ["torch", "auto", "reference"])
@pytest.mark.parametrize("narrow", [False, True])
def test_the_sum_is_that_of_the_summed_loss_on_every_backend(kernels: str, narrow: bool) -> None:
    hidden, weight, targets = make_arguments(700, torch.float32)
    softmax_loss = choose_backend(kernels, torch.device("cpu")).softmax_loss
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        losses = chunked_token_losses(hidden, weight, targets, softmax_loss)
        whole = chunked_cross_entropy(hidden, weight, targets, softmax_loss)
    assert losses.dtype == torch.float32
    assert losses.detach().double().sum().item() == pytest.approx(whole.item(), rel=1e-6)
    grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in (losses.sum(), whole)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
