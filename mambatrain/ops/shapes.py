"""Checks of an operator's arguments before anything is computed: the sentence names the argument and what it should be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    boundaries: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    """Raises ValueError unless the arguments fit `reference.selective_scan`."""
    check = _Checks("selective_scan", "u", u, "(B, L, E)")
    rows, length, channels = check.sizes(3)
    check.tensor("A", A, "(E, N)", (channels, None))
    states = A.shape[1]
    check.tensor("dt", dt, "(B, L, E)", u.shape)
    check.tensor("B", B, "(B, L, N)", (rows, length, states))
    check.tensor("C", C, "(B, L, N)", (rows, length, states))
    check.tensor("D", D, "(E,)", (channels,))
    check.tensor("z", z, "(B, L, E)", u.shape)
    check.tensor("dt_bias", dt_bias, "(E,)", (channels,))
    check.tensor("initial_state", initial_state, "(B, E, N)", (rows, channels, states))
    check.boundaries(boundaries, (rows, length))


def check_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    boundaries: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    """Raises ValueError unless the arguments fit `reference.ssd`."""
    check = _Checks("ssd", "x", x, "(B, L, H, P)")
    rows, length, heads, head_dim = check.sizes(4)
    check.tensor("dt", dt, "(B, L, H)", (rows, length, heads))
    check.tensor("A", A, "(H,)", (heads,))
    check.tensor("B", B, "(B, L, G, N)", (rows, length, None, None))
    groups, states = B.shape[2:]
    if groups == 0 or heads % groups != 0:
        raise ValueError(f"ssd: x has {heads} heads, which is not a multiple of the {groups} groups of B")
    check.tensor("C", C, "(B, L, G, N)", (rows, length, groups, states))
    check.tensor("D", D, "(H,)", (heads,))
    check.tensor("dt_bias", dt_bias, "(H,)", (heads,))
    check.tensor("initial_state", initial_state, "(B, H, P, N)", (rows, heads, head_dim, states))
    check.boundaries(boundaries, (rows, length))


def check_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, boundaries: Tensor | None, initial_window: Tensor | None
) -> None:
    """Raises ValueError unless the arguments fit `reference.causal_conv`."""
    check = _Checks("causal_conv", "x", x, "(B, L, D)")
    rows, length, channels = check.sizes(3)
    check.tensor("weight", weight, "(D, W)", (channels, None))
    width = weight.shape[1]
    if width == 0:
        raise ValueError(f"causal_conv: weight has shape {tuple(weight.shape)}, but it needs one tap at least")
    check.tensor("bias", bias, "(D,)", (channels,))
    check.tensor("initial_window", initial_window, "(B, W - 1, D)", (rows, width - 1, channels))
    check.boundaries(boundaries, (rows, length))


def check_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Raises ValueError unless the arguments fit `reference.cross_entropy`."""
    check = _Checks("cross_entropy", "hidden", hidden, "(T, D)")
    positions, width = check.sizes(2)
    check.tensor("weight", weight, "(V, D)", (None, width))
    check.tensor("targets", targets, "(T,)", (positions,), dtype=torch.int64)


class _Checks:
    """The checks of one call; the first argument is the one that the others are held against."""

    def __init__(self, operator: str, name: str, first: Tensor, letters: str) -> None:
        self._operator, self._first_name, self._first, self._letters = operator, name, first, letters
        self.tensor(name, first, letters, (None,) * len(letters.split(",")))

    def sizes(self, num_dims: int) -> tuple[int, ...]:
        assert self._first.dim() == num_dims
        return tuple(self._first.shape)

    def boundaries(self, boundaries: Tensor | None, shape: Sequence[int]) -> None:
        self.tensor("boundaries", boundaries, "(B, L)", shape, dtype=torch.bool)

    def tensor(
        self,
        name: str,
        tensor: Tensor | None,
        letters: str,
        expected: Sequence[int | None],
        dtype: torch.dtype | None = None,
    ) -> None:
        """`expected` holds None where any size will do; `dtype` None asks for any float."""
        if tensor is None:
            return
        fits = tensor.dim() == len(expected) and all(
            want is None or size == want for size, want in zip(tensor.shape, expected, strict=True)
        )
        if not fits:
            wanted = ", ".join(
                letter.strip("( )") if want is None else str(want)
                for letter, want in zip(letters.rstrip(",)").split(","), expected, strict=False)
            )
            raise ValueError(
                f"{self._operator}: {name} has shape {tuple(tensor.shape)}, but {letters} should be ({wanted})"
            )
        if dtype is None and not tensor.is_floating_point():
            raise ValueError(f"{self._operator}: {name} has dtype {tensor.dtype}, but it should be a float")
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{self._operator}: {name} has dtype {tensor.dtype}, but it should be {dtype}")
        if tensor.device != self._first.device:
            raise ValueError(
                f"{self._operator}: {name} is on {tensor.device}, but {self._first_name} is on {self._first.device}"
            )
