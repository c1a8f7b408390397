"""Which implementation of the operators runs: chosen once, with the reason, never changed silently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mambatrain.errors import UserError, nearest
from mambatrain.ops import causal_conv, reference, selective_scan, ssd


class SelectiveScan(Protocol):
    """Mamba-1's scan; `ops/reference.py` says what each argument is."""

    def __call__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        *,
        boundaries: Tensor | None = None,
        initial_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class SSD(Protocol):
    """Mamba-2's scan; `ops/reference.py` says what each argument is."""

    def __call__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        *,
        boundaries: Tensor | None = None,
        initial_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class CausalConv(Protocol):
    """Depthwise causal convolution and SiLU; `ops/reference.py` says what each argument is."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        boundaries: Tensor | None = None,
        initial_window: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Backend:
    """One implementation of every operator that differs between backends."""

    name: str
    reason: str
    """Why it was chosen, a sentence for people."""
    selective_scan: SelectiveScan
    ssd: SSD
    causal_conv: CausalConv


def choose_backend(asked: str, device: torch.device) -> Backend:
    """The backend for what was asked on the command line.

    Args:
        asked: auto, native, torch or reference.
        device: where the model will run.

    Raises:
        UserError: the name is unknown, or the backend cannot run here. A slower one is never taken in its place.
    """
    choices: dict[str, Callable[[torch.device], Backend]] = {
        "auto": _choose_automatically,
        "native": _native,
        "torch": lambda _: _torch("asked for"),
        "reference": lambda _: _reference("asked for"),
    }
    if asked not in choices:
        close = nearest(asked, list(choices))
        hint = f"did you mean `--kernels {close}`?" if close else f"--kernels takes {', '.join(choices)}"
        raise UserError(f"there is no kernels backend named {asked!r}", hint)
    return choices[asked](device)


def _choose_automatically(device: torch.device) -> Backend:
    return _torch(f"the fastest in this installation for {device.type}: native kernels are not part of it")


def _native(device: torch.device) -> Backend:
    """The place where a native backend is made, once there is one for `device`."""
    raise UserError(f"native kernels for {device.type} are not part of this installation", "--kernels torch")


def _torch(reason: str) -> Backend:
    return Backend("torch", reason, selective_scan.selective_scan, ssd.ssd, causal_conv.causal_conv)


def _reference(reason: str) -> Backend:
    return Backend("reference", reason, reference.selective_scan, reference.ssd, reference.causal_conv)
