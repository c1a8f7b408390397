"""Mamba-2's scan in Triton, its kernels interpreted on the CPU, against the reference in fp64.

`tests/parity/test_triton.py` runs this in a process of its own, where TRITON_INTERPRET is set before any import.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_interpreter  # noqa: F401  changes it
import yardstick
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.ops.triton.ssd import ssd
from mambatrain.recipe import ModelSection

SSD = replace(yardstick.SSD, native=ssd)
SIZES = {"R": 1, "H": 1, "G": 1, "P": 5, "N": 9}  # small, because interpreted
ALONG_TIME = ("x", "dt", "B", "C")
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129)
Tensors = dict[str, Tensor]


def boundaries_around(edges: tuple[int, ...], length: int) -> Tensor:
    """(1, L): at 0, on and around edges, next to each other."""
    return yardstick.boundaries_around(edges, length)[:1]


def run(arguments: Tensors, boundaries: Tensor | None = None) -> list[Tensor]:
    """Outputs and every gradient."""
    return list(yardstick.run(ssd, arguments, boundaries).values())


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length: int) -> None:
    arguments = SSD.arguments(L=length, **SIZES)
    yardstick.assert_as_right_as_the_reference(SSD, arguments, boundaries_around((32, 64, 96, 128), length))
    if length in (1, 64, 129):
        yardstick.assert_as_right_as_the_reference(SSD, arguments)


@pytest.mark.parametrize("left_out", [(), ("D",), ("dt_bias",), ("initial_state",), SSD.optional])
def test_optional_arguments(left_out: tuple[str, ...]) -> None:
    arguments = SSD.arguments(L=67, **SIZES)
    kept = {name: tensor for name, tensor in arguments.items() if name not in left_out}
    yardstick.assert_as_right_as_the_reference(SSD, kept, boundaries_around((64,), 67) if left_out else None)


@pytest.mark.parametrize(
    ("rows", "heads", "groups", "channels", "states"),
    [(1, 1, 1, 1, 1), (2, 4, 2, 8, 8), (1, 2, 2, 64, 16), (1, 9, 1, 3, 8), (1, 1, 1, 33, 70), (1, 1, 1, 8, 256)],
)
def test_sizes(rows: int, heads: int, groups: int, channels: int, states: int) -> None:
    arguments = SSD.arguments(R=rows, L=35, H=heads, G=groups, P=channels, N=states)
    boundaries = yardstick.boundaries_around((32,), 35)[:rows]
    yardstick.assert_as_right_as_the_reference(SSD, arguments, boundaries)


@pytest.mark.parametrize(("dtype", "length"), [(torch.bfloat16, 259), (torch.float16, 131)], ids=["bf16", "fp16"])
def test_narrow_inputs(dtype: torch.dtype, length: int) -> None:
    """Three chunks."""
    arguments = SSD.arguments(dtype, L=length, **(SIZES | {"H": 2, "P": 16, "N": 24}))
    yardstick.assert_as_right_as_the_reference(SSD, arguments, boundaries_around((length // 2,), length))


def test_dtypes_may_be_mixed() -> None:
    arguments = SSD.arguments(L=40, **SIZES)
    halves = {name: arguments[name].bfloat16() for name in ("dt", "C", "D", "dt_bias", "initial_state")}
    yardstick.assert_as_right_as_the_reference(SSD, arguments | halves, boundaries_around((32,), 40))


def test_extreme_deltas() -> None:
    """Softplus and its slope far from 0 and around 20, where torch turns to the identity; decays down to 0."""
    arguments = SSD.arguments(L=70, **SIZES)
    arguments["dt"] = torch.linspace(-100, 60, arguments["dt"].numel()).view(arguments["dt"].shape)
    yardstick.assert_as_right_as_the_reference(SSD, arguments)


def test_long_decays_are_differences_of_large_sums() -> None:
    arguments = SSD.arguments(L=64, **SIZES)
    arguments["A"] = torch.tensor([-1e3])
    arguments["dt"][:, 20:50] = -12.0  # behind large exponents ones that hardly decay
    yardstick.assert_as_right_as_the_reference(SSD, arguments)


@pytest.mark.parametrize("index", [0, 1])
def test_only_one_output_has_a_gradient(index: int) -> None:
    gradients = []
    for form in (SSD.reference, ssd):
        leaves = {name: tensor.requires_grad_() for name, tensor in SSD.arguments(L=35, **SIZES).items()}
        used = form(**leaves)[index].square().sum()
        gradients.append(torch.autograd.grad(used, list(leaves.values()), allow_unused=True))
    for wanted, found in zip(*gradients, strict=True):
        if wanted is None:
            assert not found.any()
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("cut", "starts"), [(0, ()), (1, (3,)), (32, (32, 64)), (65, (10, 65))])
def test_cut_anywhere(cut: int, starts: tuple[int, ...]) -> None:
    """scan(whole) == scan(head), then scan(tail, state), up to rounding: chunks begin elsewhere."""
    length = 66
    boundaries = torch.zeros(1, length, dtype=torch.bool)
    boundaries[0, list(starts)] = True
    leaves = {name: tensor.requires_grad_() for name, tensor in SSD.arguments(L=length, **SIZES).items()}

    def cut_time(span: slice) -> Tensors:
        return {name: tensor[:, span] if name in ALONG_TIME else tensor for name, tensor in leaves.items()}

    whole = ssd(**leaves, boundaries=boundaries)
    head, state = ssd(**cut_time(slice(cut)), boundaries=boundaries[:, :cut])
    tail, last = ssd(**(cut_time(slice(cut, None)) | {"initial_state": state}), boundaries=boundaries[:, cut:])
    in_parts = (torch.cat([head, tail], dim=1), last)
    weights = [torch.cos(torch.arange(out.numel()) % 97).view(out.shape) for out in whole]
    wanted = torch.autograd.grad(whole, list(leaves.values()), weights)
    found = torch.autograd.grad(in_parts, list(leaves.values()), weights)
    for ours, theirs in zip((*in_parts, *found), (*whole, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize(
    ("lengths", "chosen", "dtype"),
    [
        ((31, 1, 1, 40), 0, torch.float32),
        ((63, 2, 64), 1, torch.float32),
        ((64, 30), 1, torch.float32),
        ((100, 27, 3), 1, torch.bfloat16),
    ],
)
def test_packed_equals_separate(lengths: tuple[int, ...], chosen: int, dtype: torch.dtype) -> None:
    """Documents side by side give what each gives alone, and gradients of the chosen one are exactly 0 elsewhere."""
    length = sum(lengths)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    boundaries = torch.zeros(1, length, dtype=torch.bool)
    boundaries[0, starts] = True
    arguments = SSD.arguments(dtype, L=length, **SIZES)
    leaves = {name: arguments[name].requires_grad_() for name in (*ALONG_TIME, "initial_state")}
    packed, last = ssd(**arguments, boundaries=boundaries)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    spans = [slice(start, start + size) for start, size in zip(starts, lengths, strict=True)]
    for span in spans:
        own = {name: tensor[:, span] if name in ALONG_TIME else tensor for name, tensor in arguments.items()}
        alone, alone_last = ssd(**(own | {"initial_state": None}))
        torch.testing.assert_close(packed[:, span], alone, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(last, alone_last, rtol=tolerance, atol=tolerance)
    outputs = [packed[:, spans[chosen]].float().sum()] + ([last.sum()] if chosen == len(spans) - 1 else [])
    grads = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values())), strict=True))
    assert not grads.pop("initial_state").any(), "the state before the first boundary"
    for name, grad in grads.items():
        assert grad[:, spans[chosen]].any(), name
        grad[:, spans[chosen]] = 0
        assert not grad.any(), f"{name} of another document"


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("start", [1, 33, 64])
def test_an_inf_does_not_cross_a_boundary(start: int, bad: float) -> None:
    length = 66
    arguments = SSD.arguments(L=length, **SIZES)
    boundaries = torch.zeros(1, length, dtype=torch.bool)
    boundaries[:, start] = True
    clean, clean_last = ssd(**arguments, boundaries=boundaries)
    for name in ALONG_TIME:
        arguments[name][0, start - 1] = bad
    arguments["initial_state"][0, 0] = -bad
    leaves = {name: arguments[name].requires_grad_() for name in ALONG_TIME}
    found, last = ssd(**arguments, boundaries=boundaries)
    # Not to the bit: the sum of exponents begins at the entry of the chunk.
    torch.testing.assert_close(found[:, start:], clean[:, start:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, clean_last, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(found[:, start:].sum() + last.sum(), list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        assert grad[:, start:].isfinite().all(), name


def test_a_nan_is_not_lost() -> None:
    """Wherever one goes in, what the reference makes NaN or inf of it is not finite here, and nothing before it is."""
    arguments = SSD.arguments(L=40, **SIZES)
    for spoilt in ALONG_TIME:
        inputs = {name: tensor.clone() for name, tensor in arguments.items()}
        inputs[spoilt][0, 10] = math.nan
        found, last = ssd(**inputs)
        wanted, wanted_last = SSD.reference(**inputs)
        assert not found[~wanted.isfinite()].isfinite().any(), spoilt
        assert not last[~wanted_last.isfinite()].isfinite().any(), spoilt
        assert found[:, :10].isfinite().all(), spoilt
    found, last = ssd(**(arguments | {"A": torch.tensor([math.nan])}))
    assert not found.isfinite().any()
    assert not last.isfinite().any()


@pytest.mark.parametrize("value", [1.0, math.inf])
def test_a_boundary_at_0_discards_the_state_before(value: float) -> None:
    arguments = SSD.arguments(L=20, **SIZES)
    boundaries = torch.zeros(1, 20, dtype=torch.bool)
    boundaries[:, 0] = True
    state = torch.full_like(arguments.pop("initial_state"), value).requires_grad_()
    out, last = ssd(**arguments, boundaries=boundaries, initial_state=state)
    fresh, fresh_last = ssd(**arguments, boundaries=boundaries)
    assert_same_bits([out, last], [fresh, fresh_last])
    (grad,) = torch.autograd.grad(out.sum() + last.sum(), state)
    assert torch.equal(grad, torch.zeros_like(state))


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "length"), [(1, 0), (0, 5), (1, 33), (1, 65)])
def test_no_memory_is_read_before_it_is_written(rows: int, length: int, dtype: torch.dtype) -> None:
    """And the same bits come out twice."""
    arguments = SSD.arguments(dtype, **(SIZES | {"R": rows, "L": length}))
    boundaries = torch.zeros(rows, length, dtype=torch.bool)
    boundaries[:, 20:21] = True
    found = run(arguments, boundaries)
    assert all(tensor.isfinite().all() for tensor in found)
    torch.use_deterministic_algorithms(False)
    assert_same_bits(run(arguments, boundaries), found)


def test_an_empty_row_hands_its_state_on() -> None:
    arguments = SSD.arguments(L=0, **SIZES)
    carried = arguments["initial_state"].requires_grad_()
    out, state = ssd(**arguments)
    assert out.shape[1] == 0
    assert torch.equal(state, carried)
    state.sum().backward()
    assert torch.equal(carried.grad, torch.ones_like(carried))


def test_views_give_the_same_bits() -> None:
    """Slices of a projection; every second channel; time and channels exchanged in memory."""
    arguments = {name: tensor.detach() for name, tensor in SSD.arguments(L=37, **SIZES).items()}
    boundaries = boundaries_around((32,), 37)
    wanted = run(arguments, boundaries)
    slices = {name: torch.cat([arguments[name]] * 2, dim=1)[:, :37] for name in ALONG_TIME}
    spread = {name: torch.stack([arguments[name]] * 2, dim=-1).flatten(-2)[..., ::2] for name in ALONG_TIME}
    exchanged = {name: arguments[name].transpose(1, -1).contiguous().transpose(1, -1) for name in ALONG_TIME}
    for views in (slices, spread, exchanged):
        assert_same_bits(run(arguments | views, boundaries), wanted)


def test_offsets_beyond_32_bits() -> None:
    """Views whose second row begins past 2^32 bytes; only the pages they touch are ever used."""
    arguments = SSD.arguments(torch.bfloat16, L=3, **(SIZES | {"R": 2, "H": 1}))
    wanted = ssd(**arguments)
    try:
        memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"this machine gives no 4 GB of addresses: {error}")
    far = memory.as_strided((2, *arguments["x"].shape[1:]), (2**31, *arguments["x"].stride()[1:]))
    far.copy_(arguments["x"])
    assert_same_bits(list(ssd(**(arguments | {"x": far}))), list(wanted))


def test_opcheck() -> None:
    operator = torch.ops.mambatrain.ssd_triton.default
    names = [argument.name for argument in operator._schema.arguments]
    leaves = {name: tensor.requires_grad_() for name, tensor in SSD.arguments(L=5, **SIZES).items()}
    leaves["boundaries"] = boundaries_around((), 5)
    torch.library.opcheck(operator, tuple(leaves[name] for name in names))
    bare = leaves | dict.fromkeys((*SSD.optional, "boundaries"))
    torch.library.opcheck(operator, tuple(bare[name] for name in names), test_utils=("test_schema", "test_faketensor"))


def test_compile_traces_the_whole() -> None:
    compiled = torch.compile(ssd, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 37):
        arguments = SSD.arguments(L=length, **SIZES)
        boundaries = boundaries_around((32,), length)
        assert_same_bits(list(yardstick.run(compiled, arguments, boundaries).values()), run(arguments, boundaries))


def test_blocks_computed_again_give_the_same_bits() -> None:
    """Activation checkpointing around the operator alone, and around the blocks of a model."""
    length, boundaries = 37, boundaries_around((20,), 37)
    wanted = run(SSD.arguments(L=length, **SIZES), boundaries)

    def again(*arguments: Any, **named: Any) -> Any:
        return checkpoint(ssd, *arguments, use_reentrant=False, **named)

    found = yardstick.run(again, SSD.arguments(L=length, **SIZES), boundaries)
    assert_same_bits(list(found.values()), wanted)

    section = ModelSection(block="mamba2", d_model=8, num_layers=2, vocab_size=20, d_state=8, head_dim=8)
    model = LanguageModel(section, replace(choose_backend("torch", torch.device("cpu")), ssd=ssd))
    initialise(model, section, seed=0)
    tokens = torch.arange(length)[None] % 20
    results = []
    for model.recompute_every in (0, 2, 1):
        model.zero_grad()
        loss = model.summed_loss(tokens, boundaries, tokens)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for computed_again in results[1:]:
        assert_same_bits(computed_again, results[0])
