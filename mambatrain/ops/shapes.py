"""Checks of an operator's arguments before anything is computed: the error says what each should have been."""

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
    require = _Requirements("selective_scan", "u", u)
    require("u", u, "(B, L, E)", (None, None, None))
    rows, length, channels = u.shape
    require("A", A, "(E, N)", (channels, None))
    states = A.shape[1]
    require("dt", dt, "(B, L, E)", u.shape)
    require("B", B, "(B, L, N)", (rows, length, states))
    require("C", C, "(B, L, N)", (rows, length, states))
    require("D", D, "(E,)", (channels,))
    require("z", z, "(B, L, E)", u.shape)
    require("dt_bias", dt_bias, "(E,)", (channels,))
    require("boundaries", boundaries, "(B, L)", (rows, length), torch.bool)
    require("initial_state", initial_state, "(B, E, N)", (rows, channels, states))


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
    require = _Requirements("ssd", "x", x)
    require("x", x, "(B, L, H, P)", (None, None, None, None))
    rows, length, heads, head_dim = x.shape
    require("dt", dt, "(B, L, H)", (rows, length, heads))
    require("A", A, "(H,)", (heads,))
    require("B", B, "(B, L, G, N)", (rows, length, None, None))
    groups, states = B.shape[2:]
    if groups == 0 or heads % groups != 0:
        raise ValueError(f"ssd: the {heads} heads of x are not a multiple of the {groups} groups of B")
    require("C", C, "(B, L, G, N)", B.shape)
    require("D", D, "(H,)", (heads,))
    require("dt_bias", dt_bias, "(H,)", (heads,))
    require("boundaries", boundaries, "(B, L)", (rows, length), torch.bool)
    require("initial_state", initial_state, "(B, H, P, N)", (rows, heads, head_dim, states))


def check_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, boundaries: Tensor | None, initial_window: Tensor | None
) -> None:
    """Raises ValueError unless the arguments fit `reference.causal_conv`."""
    require = _Requirements("causal_conv", "x", x)
    require("x", x, "(B, L, D)", (None, None, None))
    rows, length, channels = x.shape
    require("weight", weight, "(D, W)", (channels, None))
    if weight.shape[1] == 0:
        raise ValueError("causal_conv: weight has no taps, its shape (D, W) needs W >= 1")
    require("bias", bias, "(D,)", (channels,))
    require("boundaries", boundaries, "(B, L)", (rows, length), torch.bool)
    require("initial_window", initial_window, "(B, W - 1, D)", (rows, weight.shape[1] - 1, channels))


def check_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Raises ValueError unless the arguments fit `reference.cross_entropy`."""
    require = _Requirements("cross_entropy", "hidden", hidden)
    require("hidden", hidden, "(T, D)", (None, None))
    require("weight", weight, "(V, D)", (None, hidden.shape[1]))
    require("targets", targets, "(T,)", (hidden.shape[0],), torch.int64)


def check_softmax_loss(logits: Tensor, targets: Tensor) -> None:
    """Raises ValueError unless the arguments fit `cross_entropy.plain_softmax_loss`."""
    require = _Requirements("softmax_loss", "logits", logits)
    require("logits", logits, "(R, V)", (None, None))
    require("targets", targets, "(R,)", (logits.shape[0],), torch.int64)


class _Requirements:
    """Compares the arguments of one call with what they should be; all on the device of the first."""

    def __init__(self, operator: str, first_name: str, first: Tensor) -> None:
        self.operator, self.first_name, self.device = operator, first_name, first.device

    def __call__(
        self,
        name: str,
        tensor: Tensor | None,
        letters: str,
        shape: Sequence[int | None],
        dtype: torch.dtype | None = None,
    ) -> None:
        """A size of None may be any; a dtype of None is any float; a tensor of None was left out and fits."""
        if tensor is None:
            return
        if len(tensor.shape) != len(shape) or any(
            wanted is not None and size != wanted for size, wanted in zip(tensor.shape, shape, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            sizes = "" if all(size is None for size in shape) else f" = ({wanted})"
            raise ValueError(f"{self.operator}: {name} has shape {tuple(tensor.shape)}, but should be {letters}{sizes}")
        if tensor.dtype != dtype and (dtype is not None or not tensor.is_floating_point()):
            raise ValueError(
                f"{self.operator}: {name} has dtype {tensor.dtype}, but should be {dtype or 'floating point'}"
            )
        if tensor.device != self.device:
            raise ValueError(
                f"{self.operator}: {name} is on {tensor.device}, but {self.first_name} is on {self.device}"
            )
