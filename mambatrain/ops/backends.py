"""Which implementation of the operators runs: chosen once, with the reason, never changed silently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mambatrain.errors import UserError, nearest
from mambatrain.ops import causal_conv, mamba_ssm, native, reference, selective_scan, ssd
from mambatrain.ops.cross_entropy import SoftmaxLoss, plain_softmax_loss
from mambatrain.ops.triton import ssd as triton_ssd


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
    softmax_loss: SoftmaxLoss = plain_softmax_loss
    tolerance: float = 1e-4
    """Of the largest value of a tensor, what `check_backend` allows in fp32: rounding gives 1e-6 on its inputs; a wrong
    boundary, a lost term, products in TF32 or bf16 give 1e-3 and more."""


def choose_backend(asked: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """The backend for what was asked on the command line.

    Args:
        asked: one of `BACKENDS`.
        device: where the model will run.
        dtype: what the model computes in; native kernels take float32 and bfloat16, on CUDA float16 too.

    Raises:
        UserError: the name is unknown, or the backend cannot run here. A slower one is never taken in its place.
    """
    if asked not in BACKENDS:
        close = nearest(asked, list(BACKENDS))
        hint = f"did you mean `--kernels {close}`?" if close else f"--kernels takes {', '.join(BACKENDS)}"
        raise UserError(f"there is no kernels backend named {asked!r}", hint)
    return BACKENDS[asked](device, dtype)


def _choose_automatically(device: torch.device, dtype: torch.dtype) -> Backend:
    missing = _why_no_native(device, dtype)
    return _native(device, dtype) if missing is None else _torch(f"native kernels cannot run: {missing}")


def _native(device: torch.device, dtype: torch.dtype) -> Backend:
    missing = _why_no_native(device, dtype)
    if missing is not None:
        hint = "--kernels torch, or install g++ or clang++ and then mambatrain again: its kernels are built with it"
        if device.type != "cpu":
            hint = "--kernels torch"
        raise UserError(f"native kernels cannot run: {missing}", hint)
    reason = native.describe(device)
    if device.type == "cpu":
        return Backend("native", reason, native.selective_scan, native.ssd, native.causal_conv, native.softmax_loss)
    return Backend("native", reason, native.selective_scan, triton_ssd.ssd, native.causal_conv)


def _why_no_native(device: torch.device, dtype: torch.dtype) -> str | None:
    missing = native.why_unavailable(device, dtype)
    return triton_ssd.why_unavailable() if missing is None and device.type == "cuda" else missing


def _torch(reason: str) -> Backend:
    return Backend("torch", reason, selective_scan.selective_scan, ssd.ssd, causal_conv.causal_conv)


def _reference(reason: str) -> Backend:
    operators = reference.selective_scan, reference.ssd, reference.causal_conv
    return Backend("reference", reason, *operators, reference.softmax_loss)


def _mamba_ssm(device: torch.device) -> Backend:
    missing = mamba_ssm.why_unavailable(device)
    if missing is not None:
        hint = "pip install 'mambatrain[mamba-ssm]' on a machine with a GPU and the CUDA toolkit, or --kernels auto"
        raise UserError(f"mamba-ssm's kernels cannot run: {missing}", hint)
    operators = mamba_ssm.selective_scan, mamba_ssm.ssd, mamba_ssm.causal_conv
    return Backend("mamba-ssm", "asked for", *operators, tolerance=mamba_ssm.TOLERANCE)


BACKENDS: dict[str, Callable[[torch.device, torch.dtype], Backend]] = {
    "auto": _choose_automatically,
    "native": _native,
    "torch": lambda device, dtype: _torch("asked for"),
    "reference": lambda device, dtype: _reference("asked for"),
    "mamba-ssm": lambda device, dtype: _mamba_ssm(device),
}
"""What --kernels takes."""
