"""Softmax cross-entropy of rows of logits by `kernels/cpu/softmax_loss.cpp`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mambatrain.ops.native.cpu.library import FLOATS, load_library
from mambatrain.ops.native.operators import address, define_operator
from mambatrain.ops.shapes import check_softmax_loss


class _Arguments(ctypes.Structure):
    """SoftmaxLossArguments of `kernels/cpu/softmax_loss.cpp`: the same fields in the same order."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "num_threads")),
        ("logits", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("targets", ctypes.c_void_p),
        ("losses", ctypes.c_void_p),
        ("wants_gradient", ctypes.c_int64),
    )


def softmax_loss(logits: Tensor, targets: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """`cross_entropy.plain_softmax_loss`: same arguments, same results; the gradients replace the logits.

    Raises:
        ValueError: an argument has a wrong shape, dtype or layout, or a target is no column; nothing was computed.
    """
    check_softmax_loss(logits, targets)
    if logits.dtype not in FLOATS or not logits.is_contiguous():
        raise ValueError(f"softmax_loss: logits are {logits.dtype}; they should be float32 or bfloat16, contiguous")
    losses: Tensor = _operator(logits, targets, wants_gradient)
    return losses, logits if wants_gradient else None


def _compute(logits: Tensor, targets: Tensor, wants_gradient: bool) -> Tensor:
    losses, targets = _fake(logits, targets, wants_gradient), targets.contiguous()
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise ValueError(f"softmax_loss: a target is not below V = {logits.shape[1]}, or is negative")
    arguments = _Arguments(
        *(*logits.shape, torch.get_num_threads()),
        *(address(logits), FLOATS[logits.dtype], address(targets), address(losses), int(wants_gradient)),
    )
    load_library().softmax_loss(ctypes.byref(arguments))
    return losses


def _fake(logits: Tensor, targets: Tensor, wants_gradient: bool) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


_operator = define_operator("softmax_loss", _compute, _fake, mutates=("logits",))
