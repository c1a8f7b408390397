"""The CUDA kernels on the CPU: cut anywhere, packed equals separate; any strides, order of threads and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import scan_properties
import torch
from cuda_on_cpu import needs_compiler, on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambatrain.ops import native

pytestmark = needs_compiler
OPERATORS = ("selective_scan", "causal_conv")
every_operator = pytest.mark.parametrize("name", OPERATORS)


def run(name: str, arguments: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and every gradient."""
    leaves = {
        key: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
        for key, tensor in arguments.items()
    }
    outputs = scan_properties.SCANS[name](**leaves)
    floats = [tensor for tensor in leaves.values() if tensor.is_floating_point()]
    weights = [torch.cos(torch.arange(out.numel())).view(out.shape).to(out.dtype) for out in outputs]
    return [out.detach() for out in outputs] + list(torch.autograd.grad(outputs, floats, weights))


def make_arguments(name: str, length: int, rows: int = 2) -> dict[str, Tensor]:
    boundaries = torch.rand(rows, length, generator=torch.Generator().manual_seed(length)) < 0.1
    return scan_properties.make_arguments(name, length, rows) | {"boundaries": boundaries}


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


@every_operator
@settings(max_examples=10)
@given(data=st.data(), length=st.integers(1, 150))
def test_cut_anywhere(name: str, data: st.DataObject, length: int) -> None:
    with on_cpu():
        scan_properties.check_cut_anywhere(name, data, length)


@every_operator
@settings(max_examples=10)
@given(data=st.data(), lengths=st.lists(st.integers(1, 70), min_size=2, max_size=4))
def test_packed_equals_separate(name: str, data: st.DataObject, lengths: list[int]) -> None:
    with on_cpu():
        scan_properties.check_packed_equals_separate(name, data, lengths)


@every_operator
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("start", [1, 15, 16, 17, 32, 55, 65])
def test_an_inf_does_not_cross_a_boundary(name: str, bad: float, start: int) -> None:
    with on_cpu():
        scan_properties.check_an_inf_does_not_cross_a_boundary(name, bad, start)


@every_operator
@pytest.mark.parametrize("value", [1.0, math.inf])
def test_a_boundary_at_0_discards_the_state_before(name: str, value: float) -> None:
    with on_cpu():
        scan_properties.check_a_boundary_at_0_discards_the_state_before(name, value)


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@every_operator
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("length", [0, 1, 33, 70])
def test_no_memory_is_read_before_it_is_written(name: str, length: int) -> None:
    """Nor does anything depend on the order in which blocks, warps and threads run."""
    for arguments in (make_arguments(name, length), make_arguments(name, length, rows=0)):
        with on_cpu():
            found = run(name, arguments)
        torch.use_deterministic_algorithms(False)
        with on_cpu(reversed_order=True):
            wanted = run(name, arguments)
        torch.use_deterministic_algorithms(True)
        assert all(tensor.isfinite().all() for tensor in found)
        assert_same_bits(found, wanted)


@every_operator
def test_an_empty_row_hands_its_state_on(name: str) -> None:
    arguments = make_arguments(name, 0)
    carried = arguments[scan_properties.CARRIED[name]].requires_grad_()
    with on_cpu():
        out, state = scan_properties.SCANS[name](**arguments)
        assert out.shape[1] == 0
        assert torch.equal(state, carried)
        state.sum().backward()
    assert torch.equal(carried.grad, torch.ones_like(carried))


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_views_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    along = scan_properties.ALONG_TIME[name]
    contiguous = {key: tensor.to(dtype) if key in along else tensor for key, tensor in make_arguments(name, 37).items()}
    # a slice of a wider tensor, off the alignment; every second channel; time and channels exchanged in memory
    wider = {
        key: torch.cat([tensor[..., :1], tensor, tensor], -1)[..., 1 : 1 + tensor.shape[-1]] if key in along else tensor
        for key, tensor in contiguous.items()
    }
    spread = {key: torch.stack([tensor, tensor], dim=-1).flatten(-2)[..., ::2] for key, tensor in contiguous.items()}
    exchanged = {key: tensor.mT.contiguous().mT if tensor.dim() >= 3 else tensor for key, tensor in contiguous.items()}
    with on_cpu():
        wanted = run(name, contiguous)
        for views in (wider, spread, exchanged):
            assert_same_bits(run(name, views), wanted)


def test_channels_read_four_at_once_or_one_by_one_give_the_same_bits() -> None:
    arguments = make_arguments("selective_scan", 37)
    arguments = {  # 20 channels of 21
        key: tensor[:, :20] if key == "initial_state" else tensor[:20] if tensor.shape[0] == 21 else tensor
        for key, tensor in arguments.items()
    }
    arguments |= {key: arguments[key][..., :20].contiguous() for key in ("u", "dt", "z")}
    unaligned = {key: torch.cat([arguments[key][..., :1], arguments[key]], -1)[..., 1:] for key in ("u", "dt", "z")}
    with on_cpu():
        found, wanted = run("selective_scan", arguments), run("selective_scan", arguments | unaligned)
    for ours, theirs in zip(found, wanted, strict=True):
        if ours.dim() == 1:  # the gradients of D and bias are added up in another order
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(ours, theirs)


@every_operator
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.mambatrain, name).default
    arguments = make_arguments(name, 37)
    names = [argument.name for argument in operator._schema.arguments]
    fixed = {} if name == "causal_conv" else {"keep_entries": True}
    leaves = {key: tensor.detach().requires_grad_(tensor.is_floating_point()) for key, tensor in arguments.items()}
    with on_cpu():
        torch.library.opcheck(operator, tuple((leaves | fixed)[key] for key in names))


def test_offsets_beyond_32_bits() -> None:
    """A view whose second row begins past 2^32 bytes; only the pages it touches are ever used."""
    try:
        memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"this machine gives no 4 GB of addresses: {error}")
    x = memory.as_strided((2, 3, 8), (2**31, 8, 1))
    x.copy_(torch.randn(2, 3, 8))
    weight, state = torch.randn(8, 4), torch.randn(2, 3, 5).bfloat16()
    rate = -torch.rand(8, 5)
    with on_cpu():
        assert_same_bits(list(native.causal_conv(x, weight)), list(native.causal_conv(x.contiguous(), weight)))
        found = native.selective_scan(x, x, rate, state, state)
        assert_same_bits(list(found), list(native.selective_scan(x.contiguous(), x, rate, state, state)))


def test_other_dtypes_are_refused() -> None:
    with on_cpu():
        with pytest.raises(ValueError, match="float64, but native kernels take float32, bfloat16 and float16"):
            native.causal_conv(torch.zeros(1, 9, 3, dtype=torch.float64), torch.zeros(3, 4))
        wide = torch.zeros(1, 9, 3)
        with pytest.raises(ValueError, match=r"B has dtype torch\.float64"):
            native.selective_scan(wide, wide, torch.zeros(3, 3), wide.double(), wide)
