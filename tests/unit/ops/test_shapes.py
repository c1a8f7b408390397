"""Every argument that does not fit is refused by name, with what it should have been."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambatrain.ops.causal_conv import causal_conv
from mambatrain.ops.cross_entropy import chunked_cross_entropy
from mambatrain.ops.selective_scan import selective_scan
from mambatrain.ops.ssd import ssd

SIZES: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "selective_scan": (
        selective_scan,
        {
            "u": (2, 6, 4),
            "dt": (2, 6, 4),
            "A": (4, 3),
            "B": (2, 6, 3),
            "C": (2, 6, 3),
            "D": (4,),
            "z": (2, 6, 4),
            "dt_bias": (4,),
            "boundaries": (2, 6),
            "initial_state": (2, 4, 3),
        },
    ),
    "ssd": (
        ssd,
        {
            "x": (2, 6, 4, 5),
            "dt": (2, 6, 4),
            "A": (4,),
            "B": (2, 6, 2, 3),
            "C": (2, 6, 2, 3),
            "D": (4,),
            "dt_bias": (4,),
            "boundaries": (2, 6),
            "initial_state": (2, 4, 5, 3),
        },
    ),
    "causal_conv": (
        causal_conv,
        {"x": (2, 6, 4), "weight": (4, 3), "bias": (4,), "boundaries": (2, 6), "initial_window": (2, 2, 4)},
    ),
    "cross_entropy": (chunked_cross_entropy, {"hidden": (6, 4), "weight": (9, 4), "targets": (6,)}),
}
DTYPES = {"boundaries": torch.bool, "targets": torch.int64}
EVERY_ARGUMENT = [(operator, name) for operator, (_, sizes) in SIZES.items() for name in sizes]


def make_arguments(operator: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(size, dtype=DTYPES.get(name)) for name, size in SIZES[operator][1].items()}


@pytest.mark.parametrize("operator", SIZES)
def test_what_fits_passes(operator: str) -> None:
    SIZES[operator][0](**make_arguments(operator))


@pytest.mark.parametrize(("operator", "name"), EVERY_ARGUMENT)
def test_wrong_shapes(operator: str, name: str) -> None:
    call, sizes = SIZES[operator]
    arguments = make_arguments(operator)
    with pytest.raises(ValueError, match=rf"^{operator}: {name} has shape \(\), but should be \("):
        call(**arguments | {name: torch.zeros((), dtype=DTYPES.get(name))})
    if name == next(iter(sizes)):
        return  # any size will do, the others follow it
    dim = 1 if (operator, name) == ("cross_entropy", "weight") else 0  # a vocabulary may have any size
    wrong = list(sizes[name])
    wrong[dim] += 1
    with pytest.raises(ValueError, match=rf"^{operator}: {name} has shape .*, but should be \(.*\) = \("):
        call(**arguments | {name: torch.zeros(wrong, dtype=DTYPES.get(name))})


@pytest.mark.parametrize(("operator", "name"), EVERY_ARGUMENT)
def test_wrong_dtypes(operator: str, name: str) -> None:
    wrong = make_arguments(operator)[name].to(torch.int32)
    wanted = {"boundaries": "torch.bool", "targets": "torch.int64"}.get(name, "floating point")
    with pytest.raises(ValueError, match=f"^{operator}: {name} has dtype torch.int32, but should be {wanted}$"):
        SIZES[operator][0](**make_arguments(operator) | {name: wrong})


@pytest.mark.parametrize(("operator", "name"), EVERY_ARGUMENT)
def test_wrong_devices(operator: str, name: str) -> None:
    first = next(iter(SIZES[operator][1]))
    arguments = make_arguments(operator)
    elsewhere = arguments | {name: arguments[name].to("meta")}
    with pytest.raises(ValueError, match=f"^{operator}: .* is on (meta|cpu), but {first} is on (meta|cpu)$"):
        SIZES[operator][0](**elsewhere)


def test_the_sentence_shows_what_was_expected() -> None:
    arguments = make_arguments("selective_scan")
    with pytest.raises(ValueError, match=r"B has shape \(2, 6, 5\), but should be \(B, L, N\) = \(2, 6, 3\)"):
        selective_scan(**arguments | {"B": torch.zeros(2, 6, 5)})
    with pytest.raises(ValueError, match=r"A has shape \(5, 3\), but should be \(E, N\) = \(4, any\)"):
        selective_scan(**arguments | {"A": torch.zeros(5, 3)})
    with pytest.raises(ValueError, match=r"u has shape \(2, 6\), but should be \(B, L, E\)$"):
        selective_scan(**arguments | {"u": torch.zeros(2, 6)})


def test_heads_that_do_not_divide_into_groups() -> None:
    arguments = make_arguments("ssd")
    with pytest.raises(ValueError, match="the 4 heads of x are not a multiple of the 3 groups of B"):
        ssd(**arguments | {"B": torch.zeros(2, 6, 3, 3), "C": torch.zeros(2, 6, 3, 3)})
