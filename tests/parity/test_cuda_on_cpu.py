"""The CUDA kernels, compiled for the CPU, against the reference in fp64; the bindings are those of a GPU."""

from __future__ import annotations

import functools

import pytest
import torch
import yardstick
from cuda_on_cpu import needs_compiler, on_cpu
from yardstick import CONV, GOLDEN, LENGTHS, SELECTIVE_SCAN, Operator, boundaries_around

from mambatrain.ops import native, reference
from mambatrain.ops.native.cuda.selective_scan import Layout, count_slices

pytestmark = needs_compiler

MANY = 10_000
"""Processors that no batch here fills: a thread takes one channel instead of two."""
assert_as_right_as_the_reference = functools.partial(
    yardstick.assert_as_right_as_the_reference, ways=[("full", on_cpu)]
)
both_layouts = functools.partial(
    yardstick.assert_as_right_as_the_reference,
    ways=[("full", on_cpu), ("empty", functools.partial(on_cpu, processors=MANY))],
)


@pytest.mark.parametrize("length", LENGTHS)
def test_scan_lengths(length: int) -> None:
    boundaries = boundaries_around((16, 32, 64, 96), length)
    for channels in (1, 17, 130):  # read one at a time
        both_layouts(SELECTIVE_SCAN, SELECTIVE_SCAN.arguments(R=2, L=length, E=channels), boundaries[:2])
    both_layouts(SELECTIVE_SCAN, SELECTIVE_SCAN.arguments(R=2, L=length, E=132, seed=1))  # four at once


@pytest.mark.parametrize("states", [1, 8, 17, 64, 256])
def test_scan_sizes(states: int) -> None:
    for channels in (1, 17, 130) if states < 256 else (3, 12):
        arguments = SELECTIVE_SCAN.arguments(R=2, E=channels, N=states)
        assert_as_right_as_the_reference(SELECTIVE_SCAN, arguments, boundaries_around((16, 32), 35)[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("operator", [SELECTIVE_SCAN, CONV], ids=lambda operator: operator.name)
def test_half_precision(operator: Operator, dtype: torch.dtype) -> None:
    for channels in (40, 17):
        arguments = operator.arguments(dtype, L=67, E=channels)
        assert_as_right_as_the_reference(operator, arguments, boundaries_around((16, 32, 64), 67))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 31, 32, 33, 63, 64, 65, 127, 130])
def test_conv_lengths(length: int) -> None:
    edges = (5, 8, 64, 128)  # of groups and blocks; the window reaches across
    for channels in (1, 17, 130, 260):
        arguments = CONV.arguments(L=length, E=channels)
        assert_as_right_as_the_reference(CONV, arguments, boundaries_around(edges, length))
        assert_as_right_as_the_reference(CONV, CONV.arguments(L=length, E=channels, seed=1))


@pytest.mark.parametrize("operator", [SELECTIVE_SCAN, CONV], ids=lambda operator: operator.name)
def test_a_boundary_anywhere(operator: Operator) -> None:
    """Row r starts a document at position r and nowhere else."""
    for length in (37, 70):
        arguments = operator.arguments(R=length, L=length, E=4)
        assert_as_right_as_the_reference(operator, arguments, torch.eye(length, dtype=torch.bool))


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
def test_conv_widths(taps: int) -> None:
    for length in (1, 2, 3, 9, 66):
        for boundaries in (boundaries_around((4, 8, 64), length), None):
            assert_as_right_as_the_reference(CONV, CONV.arguments(L=length, W=taps), boundaries)


@pytest.mark.parametrize("with_boundaries", [True, False])
@pytest.mark.parametrize(
    ("operator", "left_out"),
    [
        pytest.param(operator, left_out, id=f"{operator.name}-{'-'.join(left_out)}")
        for operator in (SELECTIVE_SCAN, CONV)
        for left_out in [(name,) for name in operator.optional] + [operator.optional]
    ],
)
def test_optional_arguments(operator: Operator, left_out: tuple[str, ...], with_boundaries: bool) -> None:
    arguments = {name: tensor for name, tensor in operator.arguments(L=67).items() if name not in left_out}
    assert_as_right_as_the_reference(operator, arguments, boundaries_around((32, 64), 67) if with_boundaries else None)


def test_long_scans() -> None:
    for length in (2047, 2049):
        arguments = SELECTIVE_SCAN.arguments(R=1, L=length, E=9)
        assert_as_right_as_the_reference(SELECTIVE_SCAN, arguments, boundaries_around((1024, 1056), length)[:1])


def test_extreme_deltas() -> None:
    """Softplus and its slope far from 0 and around 20, where torch turns to the identity; decays down to 0."""
    arguments = SELECTIVE_SCAN.arguments(L=40)
    arguments["dt"] = torch.linspace(-100, 60, arguments["dt"].numel()).view(arguments["dt"].shape)
    assert_as_right_as_the_reference(SELECTIVE_SCAN, arguments)


def test_dtypes_may_be_mixed() -> None:
    arguments = SELECTIVE_SCAN.arguments(L=40)
    for names in (("dt", "C", "D", "dt_bias", "initial_state"), ("u", "B", "z")):
        halves = {name: arguments[name].bfloat16() for name in names}
        assert_as_right_as_the_reference(SELECTIVE_SCAN, arguments | halves, boundaries_around((32,), 40))
    arguments = CONV.arguments(torch.bfloat16, L=40)
    halves = {name: arguments[name].bfloat16() for name in ("weight", "bias", "initial_window")}
    assert_as_right_as_the_reference(CONV, arguments | halves, boundaries_around((32,), 40))


def test_several_groups_of_channels_in_one_slice() -> None:
    """Where partial sums would take much memory, a block adds up those of several groups."""
    rows, channels, states = 2, 150, 64
    for processors, slices in ((1, 1), (3, 3), (10, 10)):
        layout = Layout.for_sizes(states, channels, rows, processors)
        assert (layout.num_groups(channels), count_slices(layout, rows, channels, states, processors)) == (10, slices)
        arguments = SELECTIVE_SCAN.arguments(R=rows, E=channels, N=states)
        ways = [(f"{processors} processors", functools.partial(on_cpu, processors=processors))]
        boundaries = boundaries_around((16, 32), 35)[:2]
        yardstick.assert_as_right_as_the_reference(SELECTIVE_SCAN, arguments, boundaries, ways)


def test_every_slice_has_groups() -> None:
    for channels in (1, 64, 65, 1000, 1536, 5120):
        for states in (1, 16, 64, 256):
            for rows in (0, 1, 3, 64):
                for processors in (1, 20, 132):
                    layout = Layout.for_sizes(states, channels, rows, processors)
                    slices = count_slices(layout, rows, channels, states, processors)
                    groups = layout.num_groups(channels)
                    step = -(-groups // slices)  # as in the kernel
                    assert (slices - 1) * step < groups <= slices * step


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the golden file lies in a folder beside the repository, absent here")
@pytest.mark.parametrize("layer", ["layer0", "layer3", "layer5"])
def test_a_trained_models_scan(layer: str) -> None:
    inputs, wanted = yardstick.read_golden_scan(layer)
    with on_cpu():
        found = native.selective_scan(*inputs)
    for ours, theirs, truth in zip(found, reference.selective_scan(*inputs), wanted, strict=True):
        assert float((ours[0] - truth).abs().max()) <= 2 * float((theirs[0] - truth).abs().max())
