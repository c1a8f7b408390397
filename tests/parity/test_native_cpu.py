"""The C++ kernels against the reference in fp64: outputs, states and every gradient, at every level that runs here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
import yardstick
from yardstick import CONV, GOLDEN, LENGTHS, OPERATORS, SELECTIVE_SCAN, SSD, Operator, boundaries_around

from mambatrain.ops import native, reference
from mambatrain.ops.native.cpu import library

X86 = ("x86-64-v4", "x86-64-v3", "x86-64-v2")
BEST = library.processor_level()
LEVELS = X86[X86.index(BEST) :] if BEST in X86 else (BEST,)
"""The levels of the instruction set that this processor runs."""

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))


def at_level(level: str) -> Callable[[], AbstractContextManager[None]]:
    """Runs the library of a level of the instruction set."""

    @contextmanager
    def entered() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "processor_level", lambda: level)
            yield

    return entered


assert_as_right_as_the_reference = functools.partial(
    yardstick.assert_as_right_as_the_reference, ways=[(level, at_level(level)) for level in LEVELS]
)
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


@pytest.mark.parametrize("length", LENGTHS)
def test_scan_lengths(length: int) -> None:
    edges = (32, 64, 96)  # of chunks
    assert_as_right_as_the_reference(
        SELECTIVE_SCAN, SELECTIVE_SCAN.arguments(L=length, E=130), boundaries_around(edges, length)
    )
    assert_as_right_as_the_reference(SELECTIVE_SCAN, SELECTIVE_SCAN.arguments(L=length, seed=1))


@pytest.mark.parametrize("length", [*LENGTHS, 128, 129, 259])
def test_ssd_lengths(length: int) -> None:
    edges = (128, 256)  # of chunks
    arguments = SSD.arguments(L=length, H=6, P=16, N=40)
    assert_as_right_as_the_reference(SSD, arguments, boundaries_around(edges, length))
    assert_as_right_as_the_reference(SSD, SSD.arguments(L=length, seed=1))


def test_long_scans() -> None:
    for operator in (SELECTIVE_SCAN, SSD):
        for length in (2047, 2049):
            arguments = operator.arguments(R=1, L=length, E=33, N=8)
            assert_as_right_as_the_reference(operator, arguments, boundaries_around((1024, 1056), length)[:1])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 33, 63, 64, 65, 130])
def test_conv_lengths(length: int) -> None:
    edges = (5, 64, 128)  # of blocks; the window reaches across
    arguments = CONV.arguments(L=length, E=1040)  # two tiles of channels
    assert_as_right_as_the_reference(CONV, arguments, boundaries_around(edges, length))
    assert_as_right_as_the_reference(CONV, CONV.arguments(L=length, seed=1))


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
def test_conv_widths(taps: int) -> None:
    for length in (1, 2, 3, 9):
        for boundaries in (boundaries_around((4, 8), length), None):
            assert_as_right_as_the_reference(CONV, CONV.arguments(L=length, W=taps), boundaries)


@pytest.mark.parametrize("channels", [1, 3, 17, 130])
@pytest.mark.parametrize("states", [1, 8, 16, 17, 64, 256])
def test_scan_sizes(channels: int, states: int) -> None:
    arguments = SELECTIVE_SCAN.arguments(E=channels, N=states)
    assert_as_right_as_the_reference(SELECTIVE_SCAN, arguments, boundaries_around((32,), 35))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 1), (2, 2), (12, 2)])
@pytest.mark.parametrize(("channels", "states"), [(1, 8), (3, 16), (17, 17), (64, 128)])
def test_ssd_sizes(heads: int, groups: int, channels: int, states: int) -> None:
    arguments = SSD.arguments(R=2, H=heads, G=groups, P=channels, N=states)
    assert_as_right_as_the_reference(SSD, arguments, boundaries_around((32,), 35)[:2])


@pytest.mark.parametrize("with_boundaries", [True, False])
@pytest.mark.parametrize(
    ("operator", "left_out"),
    [
        pytest.param(operator, left_out, id=f"{operator.name}-{'-'.join(left_out)}")
        for operator in OPERATORS
        for left_out in [(name,) for name in operator.optional] + [operator.optional]
    ],
)
def test_optional_arguments(operator: Operator, left_out: tuple[str, ...], with_boundaries: bool) -> None:
    arguments = {name: tensor for name, tensor in operator.arguments(L=67).items() if name not in left_out}
    assert_as_right_as_the_reference(operator, arguments, boundaries_around((32, 64), 67) if with_boundaries else None)


@every_operator
@pytest.mark.parametrize("seed", [0, 1])
def test_bf16(operator: Operator, seed: int) -> None:
    arguments = operator.arguments(torch.bfloat16, seed, L=130, E=40)
    assert_as_right_as_the_reference(operator, arguments, boundaries_around((32, 64, 128), 130, seed))


def test_extreme_deltas() -> None:
    """Softplus and its slope far from 0 and around 20, where torch turns to the identity; decays down to 0."""
    for operator in (SELECTIVE_SCAN, SSD):
        arguments = operator.arguments(L=40)
        arguments["dt"] = torch.linspace(-100, 60, arguments["dt"].numel()).view(arguments["dt"].shape)
        assert_as_right_as_the_reference(operator, arguments)


def test_dtypes_may_be_mixed() -> None:
    arguments = SELECTIVE_SCAN.arguments(L=40)
    halves = {name: arguments[name].bfloat16() for name in ("dt", "C", "D", "dt_bias", "initial_state")}
    assert_as_right_as_the_reference(SELECTIVE_SCAN, arguments | halves, boundaries_around((32,), 40))
    arguments = SSD.arguments(L=40)
    halves = {name: arguments[name].bfloat16() for name in ("dt", "C", "D", "dt_bias", "initial_state")}
    assert_as_right_as_the_reference(SSD, arguments | halves, boundaries_around((32,), 40))
    arguments = CONV.arguments(torch.bfloat16, L=40)
    halves = {name: arguments[name].bfloat16() for name in ("weight", "bias")}
    assert_as_right_as_the_reference(CONV, arguments | halves, boundaries_around((32,), 40))


def test_only_one_output_has_a_gradient() -> None:
    for operator in OPERATORS:
        for index in (0, 1):
            truth, found = {}, {}
            for form, grads in ((operator.reference, truth), (operator.native, found)):
                leaves = {name: tensor.requires_grad_() for name, tensor in operator.arguments().items()}
                used = form(**leaves)[index].square().sum()
                grads.update(
                    zip(leaves, torch.autograd.grad(used, list(leaves.values()), allow_unused=True), strict=True)
                )
            for name, wanted in truth.items():
                if wanted is None:
                    assert found[name] is None or not found[name].any(), name
                else:
                    torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the golden file lies in a folder beside the repository, absent here")
@pytest.mark.parametrize("layer", ["layer0", "layer3", "layer5"])
def test_a_trained_models_scan(layer: str) -> None:
    inputs, wanted = yardstick.read_golden_scan(layer)
    found, plain = native.selective_scan(*inputs), reference.selective_scan(*inputs)
    for ours, theirs, truth in zip(found, plain, wanted, strict=True):
        assert float((ours[0] - truth).abs().max()) <= 2 * float((theirs[0] - truth).abs().max())
