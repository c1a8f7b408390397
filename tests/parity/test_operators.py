"""The fast operators against the reference in fp64: outputs, states and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mambatrain.ops import causal_conv, reference, selective_scan, ssd

Arguments = dict[str, Tensor]
GOLDEN = Path(__file__).resolve().parents[3] / "shared/data/models/typeseg_mamba/golden_selective_scan.npz"


@dataclass(frozen=True)
class Operator:
    name: str
    fast: Callable[..., tuple[Tensor, Tensor]]
    reference: Callable[..., tuple[Tensor, Tensor]]
    sizes: dict[str, str]
    """Argument -> its dimensions by letter."""
    optional: tuple[str, ...]
    roundings: int = 0
    """Roundings of a tensor's largest value that its error in fp32 may always have, whatever the reference's is."""

    def arguments(self, seed: int = 0, **letters: int) -> Arguments:
        """Random, in fp64."""
        sizes = {"R": 3, "L": 33, "E": 5, "N": 3, "H": 4, "P": 3, "G": 2, "D": 5, "W": 4, "V": 3} | letters
        generator = torch.Generator().manual_seed(seed)
        made = {
            name: torch.randn([sizes[letter] for letter in dims], generator=generator, dtype=torch.float64)
            for name, dims in self.sizes.items()
        }
        return made | ({"A": -made["A"].exp()} if "A" in made else {})


SELECTIVE_SCAN = Operator(
    "selective_scan",
    selective_scan.selective_scan,
    reference.selective_scan,
    {
        "u": "RLE",
        "dt": "RLE",
        "A": "EN",
        "B": "RLN",
        "C": "RLN",
        "D": "E",
        "z": "RLE",
        "dt_bias": "E",
        "initial_state": "REN",
    },
    ("D", "z", "dt_bias", "initial_state"),
)
SSD = Operator(
    "ssd",
    ssd.ssd,
    reference.ssd,
    {"x": "RLHP", "dt": "RLH", "A": "H", "B": "RLGN", "C": "RLGN", "D": "H", "dt_bias": "H", "initial_state": "RHPN"},
    ("D", "dt_bias", "initial_state"),
    roundings=8,  # a product adds the 64 positions of a chunk as they come, the recurrence the largest terms last
)
CONV = Operator(
    "causal_conv",
    causal_conv.causal_conv,
    reference.causal_conv,
    {"x": "RLD", "weight": "DW", "bias": "D", "initial_window": "RVD"},  # V = W - 1
    ("bias", "initial_window"),
)
OPERATORS = [pytest.param(operator, id=operator.name) for operator in (SELECTIVE_SCAN, SSD, CONV)]
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127)


def scattered_boundaries(length: int, seed: int = 0) -> Tensor:
    """(3, L): on and around the edges of chunks, at neighbouring positions, at 0, and a row with none but its last."""
    boundaries = torch.zeros(3, length, dtype=torch.bool)
    for position in (0, 15, 16, 18, 19, 31, 32, 33, 63, 64, 65, 66, 126):
        if position < length:
            boundaries[0, position] = True
    boundaries[1] = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < 0.05
    boundaries[2, -1] = True
    return boundaries


def run(
    operator: Callable[..., tuple[Tensor, Tensor]], arguments: Arguments, boundaries: Tensor | None = None
) -> dict[str, Tensor]:
    """Outputs, and the gradients of a fixed random weighting of both."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    outputs = operator(**leaves, boundaries=boundaries)
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
    named = {"out": outputs[0].detach(), "state": outputs[1].detach()}
    return named | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0  # a window of width 1 is empty


def largest_error(found: Tensor, truth: Tensor) -> float:
    return largest(found.double() - truth)


def assert_equal_to_reference(operator: Operator, arguments: Arguments, boundaries: Tensor | None) -> None:
    found, truth = (run(form, arguments, boundaries) for form in (operator.fast, operator.reference))
    for name, wanted in truth.items():
        assert found[name].shape == wanted.shape
        assert found[name].dtype == wanted.dtype
        assert largest_error(found[name], wanted) <= 1e-10 * max(1.0, largest(wanted)), name


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_length_equals_the_reference(operator: Operator, length: int) -> None:
    arguments = operator.arguments(L=length)
    assert_equal_to_reference(operator, arguments, scattered_boundaries(length))
    assert_equal_to_reference(operator, arguments, None)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_long_row_equals_the_reference(operator: Operator) -> None:
    length = ssd.SEGMENT + ssd.CHUNK + 5  # several segments of Mamba-2's scan
    assert_equal_to_reference(operator, operator.arguments(L=length), scattered_boundaries(length))


@pytest.mark.parametrize("with_boundaries", [True, False])
@pytest.mark.parametrize(
    ("operator", "left_out"),
    [
        pytest.param(operator.values[0], left_out, id=f"{operator.id}-{'-'.join(left_out)}")
        for operator in OPERATORS
        for left_out in [(name,) for name in operator.values[0].optional] + [operator.values[0].optional]
    ],
)
def test_optional_arguments_may_be_left_out(
    operator: Operator, left_out: tuple[str, ...], with_boundaries: bool
) -> None:
    arguments = {name: tensor for name, tensor in operator.arguments(L=67).items() if name not in left_out}
    assert_equal_to_reference(operator, arguments, scattered_boundaries(67) if with_boundaries else None)


@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (1, 4), (2, 2), (2, 6)])
def test_ssd_heads_in_groups(groups: int, heads: int) -> None:
    assert_equal_to_reference(SSD, SSD.arguments(L=67, H=heads, G=groups), scattered_boundaries(67))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_conv_widths(width: int) -> None:
    for length in (1, 2, 3, 9):
        arguments = CONV.arguments(L=length, W=width, V=width - 1)
        assert_equal_to_reference(CONV, arguments, scattered_boundaries(length))
        assert_equal_to_reference(CONV, arguments, None)


def test_scan_in_groups_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SELECTIVE_SCAN.arguments(L=35)
    whole = run(selective_scan.selective_scan, arguments, scattered_boundaries(35))
    monkeypatch.setattr(selective_scan, "STATES_PER_GROUP", 2 * arguments["A"].numel())  # rows 0 and 1, then row 2
    for name, tensor in run(selective_scan.selective_scan, arguments, scattered_boundaries(35)).items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("seed", [0, 1])
def test_error_is_at_most_twice_the_references(operator: Operator, dtype: torch.dtype, seed: int) -> None:
    sizes = {"R": 3, "L": 200, "E": 24, "N": 16, "H": 4, "P": 16, "G": 2, "D": 24}
    arguments = {name: tensor.to(dtype) for name, tensor in operator.arguments(seed, **sizes).items()}
    boundaries = scattered_boundaries(200, seed)
    truth = run(operator.reference, {name: tensor.double() for name, tensor in arguments.items()}, boundaries)
    found, plain = (run(form, arguments, boundaries) for form in (operator.fast, operator.reference))
    for name, wanted in truth.items():
        assert found[name].dtype == plain[name].dtype, name
        floor = operator.roundings * torch.finfo(torch.float32).eps * largest(wanted)
        assert largest_error(found[name], wanted) <= max(2 * largest_error(plain[name], wanted), floor), name


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective_scan, "CHUNK", 3)
    monkeypatch.setattr(ssd, "CHUNK", 3)
    monkeypatch.setattr(ssd, "SEGMENT", 6)
    arguments = operator.arguments(R=1, L=8, E=2, N=2, H=2, P=1, G=1, D=2)
    boundaries = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return operator.fast(**dict(zip(arguments, tensors, strict=True)), boundaries=boundaries)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the golden file lies in a folder beside the repository, absent here")
@pytest.mark.parametrize("layer", ["layer0", "layer3", "layer5"])
@pytest.mark.parametrize("form", [selective_scan.selective_scan, reference.selective_scan], ids=["torch", "reference"])
def test_a_trained_models_scan(form: Callable[..., tuple[Tensor, Tensor]], layer: str) -> None:
    import numpy as np

    with np.load(GOLDEN) as file:
        u, delta, A, B, C, D, y, state = (
            torch.from_numpy(file[f"{layer}/{name}"]).double()
            for name in ("u", "dt", "A", "B", "C", "D", "y64", "state64")
        )
    raw = torch.where(delta > 20, delta, delta + torch.log(-torch.expm1(-delta)))  # the file's is behind softplus
    out, last = form(u[None], raw[None], A, B[None], C[None], D)
    assert largest_error(out[0], y) <= 1e-10 * largest(y)
    assert largest_error(last[0], state) <= 1e-10 * largest(state)
