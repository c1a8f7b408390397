"""What every implementation of an operator is held to: arguments of any size, at most twice the reference's error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mambatrain.ops import native, reference

Scan = Callable[..., tuple[Tensor, Tensor]]
Tensors = dict[str, Tensor]
Way = tuple[str, Callable[[], AbstractContextManager[None]]]
"""A name, and what makes `native` run that way."""

GOLDEN = Path(__file__).resolve().parents[3] / "shared/data/models/typeseg_mamba/golden_selective_scan.npz"
ROUNDING = torch.finfo(torch.float32).eps
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127)


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
    weights = [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
    named = {"out": outputs[0].detach(), "state": outputs[1].detach()}
    return named | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_as_right_as_the_reference(
    operator: Operator,
    arguments: Tensors,
    boundaries: Tensor | None = None,
    ways: Iterable[Way] = (("native", nullcontext),),
) -> None:
    """The error against fp64 is at most twice that of the reference in the same dtype, whichever way it runs.

    On average over a tensor, that is (root mean square, at least 1000 elements). The worst element is a matter of
    chance in both: there, and in small tensors, where the reference may happen to be exact, 16 roundings come on top of
    the largest value; of a parameter's gradient, whose terms may cancel, of what its many terms of random sign come to.
    """
    truth = run(operator.reference, {name: tensor.double() for name, tensor in arguments.items()}, boundaries)
    plain = run(operator.reference, arguments, boundaries)
    num_updates = truth["state"].numel() * truth["out"].shape[1]
    for way, entered in ways:
        with entered():
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
            assert float(ours.abs().max()) <= allowed, f"{name}, {way}"
            if wanted.numel() >= 1000:
                assert float(ours.square().mean()) <= 4 * float(theirs.square().mean()), f"{name} on average, {way}"


def read_golden_scan(layer: str) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Inputs u, dt, A, B, C, D of a trained layer in fp32, and what they give in fp64."""
    import numpy as np

    with np.load(GOLDEN) as file:
        u, delta, A, B, C, D, y, state = (
            torch.from_numpy(file[f"{layer}/{name}"]).double()
            for name in ("u", "dt", "A", "B", "C", "D", "y64", "state64")
        )
    raw = torch.where(delta > 20, delta, delta + torch.log(-torch.expm1(-delta)))  # the file's is behind softplus
    return [tensor.float() for tensor in (u[None], raw[None], A, B[None], C[None], D)], (y, state)
