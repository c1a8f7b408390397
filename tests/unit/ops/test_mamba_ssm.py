"""The adapters to mamba-ssm on stand-ins: what they hand over fits mamba-ssm's own checks, and means what it should.

mamba-ssm itself cannot be installed here. The stand-ins check layouts, dtypes and limits as its sources do, and compute
with the reference; that the real ones compute the same nobody has seen yet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambatrain.errors import UserError
from mambatrain.ops import mamba_ssm, reference
from mambatrain.ops.backends import choose_backend
from mambatrain.ops.self_check import check_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
Operator = Callable[..., tuple[Tensor, Tensor]]


def to_boundaries(seq_idx: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Where the number changes; what came before a row is number 0."""
    if seq_idx is None:
        return None
    assert seq_idx.dtype == torch.int32
    assert seq_idx.is_contiguous()
    assert seq_idx.shape == shape
    return F.pad(seq_idx, (1, 0)).diff(dim=1) != 0


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> tuple[Tensor, Tensor]:
    assert delta_softplus
    assert return_last_state
    for tensor in (u, delta, B, C, z):
        assert tensor is None or (tensor.stride(-1) == 1 and tensor.dtype == u.dtype)
    for tensor in (A, D, delta_bias):
        assert tensor is None or tensor.dtype == torch.float32
    z = None if z is None else z.mT
    out, state = reference.selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, z, delta_bias)
    return out.mT, state


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> tuple[Tensor, Tensor]:
    assert dt_softplus
    assert return_final_states
    assert chunk_size > 0
    assert B.dtype == C.dtype == x.dtype
    boundaries = to_boundaries(seq_idx, (x.shape[0], x.shape[1]))
    return reference.ssd(x, dt, A, B, C, D, dt_bias, boundaries=boundaries, initial_state=initial_states)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
) -> Tensor:
    assert activation == "silu"
    assert x.stride(1) == 1
    assert x.shape[1] % 8 == x.stride(2) % 8 == x.stride(0) % 8 == 0
    assert 2 <= weight.shape[1] <= 4
    assert x.shape[1] == weight.shape[0]
    assert bias is None or (bias.dtype == weight.dtype and bias.shape == weight.shape[:1])
    boundaries = to_boundaries(seq_idx, (x.shape[0], x.shape[2]))
    return reference.causal_conv(x.mT, weight, bias, boundaries=boundaries)[0].mT


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (selective_scan_fn, mamba_chunk_scan_combined, causal_conv1d_fn):
        parts = mamba_ssm.FUNCTIONS[function.__name__].split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        setattr(sys.modules[".".join(parts)], function.__name__, function)


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)))


def assert_same(ours: Operator, theirs: Operator, arguments: dict[str, Any], num_used: int = 2) -> None:
    """Outputs, and every gradient of a loss that uses the first of them or both."""
    results = []
    for operator in (ours, theirs):
        leaves = {
            name: tensor.detach().clone().requires_grad_() if tensor.is_floating_point() else tensor
            for name, tensor in arguments.items()
        }
        outputs = operator(**leaves)
        losses = [(out * out.detach().cos()).sum() for out in outputs[:num_used]]
        floats = [tensor for tensor in leaves.values() if tensor.is_floating_point()]
        results.append((*outputs, *torch.autograd.grad(losses, floats)))
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def boundaries_of(length: int) -> Tensor:
    boundaries = torch.zeros(2, length, dtype=torch.bool)
    boundaries[0, [at for at in (0, 4, 5, 8) if at < length]] = True
    boundaries[1, -1] = True
    return boundaries


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("with_boundaries", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_ssd(with_state: bool, with_boundaries: bool) -> None:
    x, B, C, dt = randn(2, 9, 4 * 8 + 2 * 2 * 16 + 4).split([32, 32, 32, 4], dim=-1)
    arguments = {"x": x.unflatten(-1, (4, 8)), "dt": dt, "A": -randn(4).exp(), "D": randn(4), "dt_bias": randn(4)}
    arguments |= {"B": B.unflatten(-1, (2, 16)), "C": C.unflatten(-1, (2, 16))}
    arguments |= {"initial_state": randn(2, 4, 8, 16)} if with_state else {}
    arguments |= {"boundaries": boundaries_of(9)} if with_boundaries else {}
    assert_same(mamba_ssm.ssd, reference.ssd, arguments)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("with_boundaries", [True, False])
@pytest.mark.parametrize("with_window", [True, False])
@pytest.mark.parametrize(("length", "channels", "width"), [(1, 8, 4), (2, 8, 4), (9, 12, 3), (9, 16, 2), (10, 16, 4)])
def test_conv(length: int, channels: int, width: int, with_window: bool, with_boundaries: bool) -> None:
    x = randn(2, length, 2 * channels)[..., :channels]
    arguments = {"x": x, "weight": randn(channels, width), "bias": randn(channels)}
    arguments |= {"initial_window": randn(2, width - 1, channels)} if with_window else {}
    arguments |= {"boundaries": boundaries_of(length)} if with_boundaries else {}
    assert_same(mamba_ssm.causal_conv, reference.causal_conv, arguments)


def scan_arguments() -> dict[str, Tensor]:
    u, z, dt = randn(2, 9, 15).split(5, dim=-1)
    B, C = randn(2, 9, 6).split(3, dim=-1)
    along_time = {"u": u, "dt": dt, "B": B, "C": C, "z": z}
    return along_time | {"A": -randn(5, 3).exp(), "D": randn(5), "dt_bias": randn(5)}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("left_out", [(), ("z",), ("D", "dt_bias")])
def test_selective_scan(left_out: tuple[str, ...]) -> None:
    arguments = {name: tensor for name, tensor in scan_arguments().items() if name not in left_out}
    assert_same(mamba_ssm.selective_scan, reference.selective_scan, arguments, num_used=1)


@pytest.mark.usefixtures("installed")
def test_what_it_cannot_do_is_refused_by_name() -> None:
    arguments = scan_arguments()
    with pytest.raises(UserError, match="Mamba-1 knows no document boundaries") as refused:
        mamba_ssm.selective_scan(**arguments, boundaries=boundaries_of(9))
    assert "--kernels native" in (refused.value.hint or "")
    with pytest.raises(UserError, match="takes no state from before"):
        mamba_ssm.selective_scan(**arguments, initial_state=randn(2, 5, 3))
    with pytest.raises(UserError, match=r"2 to 4 taps, and model\.d_conv is 5"):
        mamba_ssm.causal_conv(randn(2, 9, 8), randn(8, 5))
    _, state = mamba_ssm.selective_scan(**(arguments | {"u": arguments["u"].clone().requires_grad_()}))
    with pytest.raises(RuntimeError, match="no gradient to the state behind"):
        state.sum().backward()


@pytest.mark.usefixtures("installed")
def test_the_check_before_step_1_passes_mamba2_and_names_what_mamba1_lacks() -> None:
    assert mamba_ssm.why_unavailable(CUDA) is None
    backend = choose_backend("mamba-ssm", CUDA)
    assert backend.name == "mamba-ssm"
    assert check_backend(backend, "mamba2", CPU).tolerance == mamba_ssm.TOLERANCE
    with pytest.raises(UserError, match="no document boundaries"):
        check_backend(backend, "mamba1", CPU)


@pytest.mark.usefixtures("installed")
def test_it_is_refused_off_cuda() -> None:
    with pytest.raises(UserError, match="mamba-ssm's kernels cannot run: it runs on CUDA, and the device is cpu"):
        choose_backend("mamba-ssm", CPU)


@pytest.mark.parametrize("package", ["mamba_ssm", "causal_conv1d"])
@pytest.mark.usefixtures("installed")
def test_it_is_refused_where_a_package_is_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=f"{package.replace('_', '-')} is not installed") as refused:
        choose_backend("mamba-ssm", CUDA)
    assert "mambatrain[mamba-ssm]" in (refused.value.hint or "")


def test_the_signatures_are_the_references() -> None:
    import inspect

    for name in ("selective_scan", "ssd", "causal_conv"):
        assert inspect.signature(getattr(mamba_ssm, name)) == inspect.signature(getattr(reference, name))
