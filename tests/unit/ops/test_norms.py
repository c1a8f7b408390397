"""The norms against their formula in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambatrain.ops.norms import gated_rms_norm, rms_norm

EPS = 1e-5


def plain_rms_norm(x: Tensor, eps: float = EPS) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def make(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64)


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_rms_norm_is_its_formula(eps: float) -> None:
    x, weight = make(2, 3, 8).requires_grad_(), make(8).requires_grad_()
    found, wanted = rms_norm(x, weight, eps), plain_rms_norm(x, eps) * weight
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *leaves: rms_norm(*leaves, eps), (x, weight))


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_gated_rms_norm_norms_each_group_behind_the_gate(num_groups: int) -> None:
    y, z, weight = (
        make(2, 3, 8).requires_grad_(),
        make(3, 2, 8).transpose(0, 1).requires_grad_(),
        make(8).requires_grad_(),
    )
    gated = (y * z * torch.sigmoid(z)).chunk(num_groups, dim=-1)
    wanted = torch.cat([plain_rms_norm(group) for group in gated], dim=-1) * weight
    torch.testing.assert_close(gated_rms_norm(y, z, weight, EPS, num_groups), wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *leaves: gated_rms_norm(*leaves, EPS, num_groups), (y, z, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_computed_in_fp32_whatever_the_precision(dtype: torch.dtype, autocast: bool) -> None:
    """bf16 inputs lose nothing but the rounding of the result."""
    x, z, weight = make(4, 64).to(dtype), make(4, 64).add(1).to(dtype), make(64).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = rms_norm(x, weight, EPS), gated_rms_norm(x, z, weight, EPS, 2)
    gated = (x.double() * torch.nn.functional.silu(z.double())).unflatten(-1, (2, -1))
    truth = plain_rms_norm(x.double()) * weight, plain_rms_norm(gated).flatten(-2) * weight
    for one, other in zip(found, truth, strict=True):
        assert one.dtype == dtype
        roundings = 0.55 if dtype == torch.bfloat16 else 8  # half a unit is the last rounding's
        torch.testing.assert_close(one.double(), other, rtol=roundings * torch.finfo(dtype).eps, atol=1e-7)


def test_backward_keeps_inputs_and_one_number_a_norm() -> None:
    x, z, weight = (tensor.requires_grad_() for tensor in (make(4, 64), make(4, 64), make(64)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gated_rms_norm(x, z, weight, EPS, 2)
    inputs = {tensor.data_ptr() for tensor in (x, z, weight)}
    assert [tensor.numel() for tensor in kept if tensor.data_ptr() not in inputs] == [4 * 2]


def test_a_vector_alone_is_normed() -> None:
    x, weight = make(8).requires_grad_(), make(8).requires_grad_()
    torch.testing.assert_close(rms_norm(x, weight, EPS), plain_rms_norm(x) * weight, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *leaves: rms_norm(*leaves, EPS), (x, weight))
