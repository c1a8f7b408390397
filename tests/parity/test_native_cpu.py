"""The C++ kernels against the reference in fp64: outputs, states and every gradient, at every level that runs here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mambatrain.ops import native, reference
from mambatrain.ops.native import library

Scan = Callable[..., tuple[Tensor, Tensor]]
Tensors = dict[str, Tensor]
GOLDEN = Path(__file__).resolve().parents[3] / "shared/data/models/typeseg_mamba/golden_selective_scan.npz"
ROUNDING = torch.finfo(torch.float32).eps
X86 = ("x86-64-v4", "x86-64-v3", "x86-64-v2")
BEST = library.processor_level()
LEVELS = X86[X86.index(BEST) :] if BEST in X86 else (BEST,)
"""The levels of the instruction set that this processor runs."""
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127)

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))


@dataclass(frozen=True)
class Operator:
    name: str
    native: Scan
    reference: Scan
    sizes: dict[str, str]
    """Argument -> its dimensions by letter: R rows, L positions, E channels, N states, W taps, V = W - 1; H heads of P
    channels in G groups."""
    optional: tuple[str, ...]

    def arguments(self, dtype: torch.dtype = torch.float32, seed: int = 0, **letters: int) -> Tensors:
        """Random; what has a length is of `dtype`, parameters and states are fp32."""
        sizes = {"R": 3, "L": 35, "E": 17, "N": 16, "W": 4, "H": 4, "P": 5, "G": 2} | letters
        sizes["V"] = sizes["W"] - 1
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, dims in self.sizes.items():
            tensor = torch.randn([sizes[letter] for letter in dims], generator=generator)
            made[name] = -tensor.exp() if name == "A" else tensor.to(dtype if "L" in dims else torch.float32)
        return made


SELECTIVE_SCAN = Operator(
    "selective_scan",
    native.selective_scan,
    reference.selective_scan,
    {
        **dict.fromkeys(("u", "dt", "z"), "RLE"),
        **dict.fromkeys(("B", "C"), "RLN"),
        **dict.fromkeys(("D", "dt_bias"), "E"),
        "A": "EN",
        "initial_state": "REN",
    },
    ("D", "z", "dt_bias", "initial_state"),
)
CONV = Operator(
    "causal_conv",
    native.causal_conv,
    reference.causal_conv,
    {"x": "RLE", "weight": "EW", "bias": "E", "initial_window": "RVE"},
    ("bias", "initial_window"),
)
SSD = Operator(
    "ssd",
    native.ssd,
    reference.ssd,
    {"x": "RLHP", "dt": "RLH", "A": "H", "B": "RLGN", "C": "RLGN", "D": "H", "dt_bias": "H", "initial_state": "RHPN"},
    ("D", "dt_bias", "initial_state"),
)
OPERATORS = (SELECTIVE_SCAN, SSD, CONV)
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


def boundaries_around(edges: tuple[int, ...], length: int, seed: int = 0) -> Tensor:
    """(3, L): at 0, on and around edges, next to each other; scattered; none but the last."""
    boundaries = torch.zeros(3, length, dtype=torch.bool)
    for edge in (0, *edges):
        boundaries[0, [at for at in (edge - 1, edge, edge + 1, edge + 3) if 0 <= at < length]] = True
    boundaries[1] = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < 0.05
    boundaries[2, -1:] = True
    return boundaries


def run(scan: Scan, arguments: Tensors, boundaries: Tensor | None = None) -> Tensors:
    """Outputs, and the gradients of a fixed random weighting of both."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    outputs = scan(**leaves, boundaries=boundaries)
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
    named = {"out": outputs[0].detach(), "state": outputs[1].detach()}
    return named | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_as_right_as_the_reference(operator: Operator, arguments: Tensors, boundaries: Tensor | None = None) -> None:
    """The error against fp64 is at most twice that of the reference in the same dtype.

    On average over a tensor, that is (root mean square, at least 1000 elements). The worst element is a matter of
    chance in both: there, and in small tensors, where the reference may happen to be exact, 16 roundings come on top of
    the largest value; of a parameter's gradient, whose terms may cancel, of what its many terms of random sign come to.
    """
    truth = run(operator.reference, {name: tensor.double() for name, tensor in arguments.items()}, boundaries)
    plain = run(operator.reference, arguments, boundaries)
    num_updates = truth["state"].numel() * truth["out"].shape[1]
    for level in LEVELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "processor_level", lambda level=level: level)
            found = run(operator.native, arguments, boundaries)
        for name, wanted in truth.items():
            assert found[name].shape == wanted.shape
            assert found[name].dtype == plain[name].dtype, name
            if wanted.numel() == 0:
                continue
            ours, theirs = (tensor[name].double() - wanted for tensor in (found, plain))
            num_terms = 0 if wanted.dim() > 2 else num_updates / wanted.numel()
            largest = max(float(wanted.abs().max()), num_terms**0.5)
            allowed = 2 * float(theirs.abs().max()) + 16 * ROUNDING * largest
            assert float(ours.abs().max()) <= allowed, f"{name}, {level}"
            if wanted.numel() >= 1000:
                assert float(ours.square().mean()) <= 4 * float(theirs.square().mean()), f"{name} on average, {level}"


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
    import numpy as np

    with np.load(GOLDEN) as file:
        u, delta, A, B, C, D, y, state = (
            torch.from_numpy(file[f"{layer}/{name}"]).double()
            for name in ("u", "dt", "A", "B", "C", "D", "y64", "state64")
        )
    raw = torch.where(delta > 20, delta, delta + torch.log(-torch.expm1(-delta)))  # the file's is behind softplus
    inputs = [tensor.float() for tensor in (u[None], raw[None], A, B[None], C[None], D)]
    (out, last), (plain, plain_last) = native.selective_scan(*inputs), reference.selective_scan(*inputs)
    for found, theirs, wanted in ((out[0], plain[0], y), (last[0], plain_last[0], state)):
        assert float((found - wanted).abs().max()) <= 2 * float((theirs - wanted).abs().max())
