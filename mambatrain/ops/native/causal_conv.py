"""Depthwise causal convolution and SiLU by `kernels/cpu/causal_conv_{forward,backward}.cpp`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mambatrain.ops.native.library import (
    FLOATS,
    View,
    address,
    define_operator,
    full_precision,
    load_library,
    readable,
    view,
)
from mambatrain.ops.shapes import check_causal_conv

MAX_TAPS = 4  # as in kernels/cpu/causal_conv.h


class _Arguments(ctypes.Structure):
    """ConvArguments of `kernels/cpu/causal_conv.h`: the same fields in the same order."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "length", "channels", "taps", "num_threads")),
        ("x", View),
        ("initial_window", View),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "boundaries")),
        *((name, View) for name in ("out", "final_window", "grad_out", "grad_window", "dx", "dinitial")),
        *((name, ctypes.c_void_p) for name in ("dweight", "dbias")),
    )


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    boundaries: Tensor | None = None,
    initial_window: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution of `reference.causal_conv`: same arguments, same results, differentiable once.

    Args:
        x: (B, L, D) float32 or bfloat16; it may be a view whose last dimension is contiguous.
        weight: (D, W), W up to 4; tap W - 1 multiplies the position itself.
        bias: (D,).
        boundaries: (B, L) bool.
        initial_window: (B, W - 1, D), the inputs before position 0, oldest first.

    Returns:
        silu(conv(x)) (B, L, D) in the dtype of x, and the window behind the last position (B, W - 1, D) in fp32, in
        which inputs before the last boundary are 0.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device; nothing was computed.
    """
    check_causal_conv(x, weight, bias, boundaries, initial_window)
    if x.dtype not in FLOATS:
        raise ValueError(f"causal_conv: x has dtype {x.dtype}, but native kernels take float32 and bfloat16")
    if weight.shape[1] > MAX_TAPS:
        raise ValueError(f"causal_conv: weight has shape {tuple(weight.shape)}, but W should be 1 to {MAX_TAPS}")
    out, window = _forward_operator(x, weight, bias, boundaries, initial_window)
    return out, window


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, boundaries: Tensor | None, initial_window: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, window = _empty_results(x, weight)
    arguments, _kept = _arguments(x, weight, bias, boundaries, initial_window)
    arguments.out, arguments.final_window = view(out), view(window)
    load_library().causal_conv_forward(ctypes.byref(arguments))
    return out, window


def _fake_forward(x, weight, bias, boundaries, initial_window):  # type: ignore[no-untyped-def]
    return _empty_results(x, weight)


def _backward(
    grad_out: Tensor | None,
    grad_window: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    boundaries: Tensor | None,
    initial_window: Tensor | None,
) -> list[Tensor]:
    gradients = _empty_gradients(x, weight, initial_window)
    dx, dweight, dbias, dinitial = gradients
    arguments, _kept = _arguments(x, weight, bias, boundaries, initial_window)
    grad_out = None if grad_out is None else readable(grad_out)
    grad_window = full_precision(grad_window)
    arguments.grad_out, arguments.grad_window = view(grad_out), view(grad_window)
    arguments.dx, arguments.dinitial = view(dx), View() if initial_window is None else view(dinitial)
    arguments.dweight, arguments.dbias = address(dweight), address(dbias)
    load_library().causal_conv_backward(ctypes.byref(arguments))
    return gradients


def _fake_backward(grad_out, grad_window, x, weight, bias, boundaries, initial_window):  # type: ignore[no-untyped-def]
    return _empty_gradients(x, weight, initial_window)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_window: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, boundaries, initial_window = ctx.saved_tensors
    dx, dweight, dbias, dinitial = _backward_operator(
        grad_out, grad_window, x, weight, bias, boundaries, initial_window
    )
    return (
        dx,
        dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None,
        None if initial_window is None else dinitial.to(initial_window.dtype),
    )


def _empty_results(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    window = x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), window


def _empty_gradients(x: Tensor, weight: Tensor, initial_window: Tensor | None) -> list[Tensor]:
    """Of x in its dtype, of weight, bias and initial window in fp32."""
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format),
        weight.new_empty(weight.shape[:1], dtype=torch.float32),
        weight.new_empty(0, dtype=torch.float32)
        if initial_window is None
        else torch.empty_like(initial_window, dtype=torch.float32, memory_format=torch.contiguous_format),
    ]


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, boundaries: Tensor | None, initial_window: Tensor | None
) -> tuple[_Arguments, tuple[Tensor | None, ...]]:
    """What forward and backward share, and the tensors whose memory it points to: keep them until C++ is done."""
    x = readable(x)
    weight = weight.float().contiguous()
    bias, initial_window = full_precision(bias), full_precision(initial_window)
    boundaries = None if boundaries is None else boundaries.contiguous()
    rows, length, channels = x.shape
    arguments = _Arguments(
        rows,
        length,
        channels,
        weight.shape[1],
        torch.get_num_threads(),
        view(x),
        view(initial_window),
        address(weight),
        address(bias),
        address(boundaries),
    )
    return arguments, (x, weight, bias, boundaries, initial_window)


_forward_operator = define_operator("causal_conv", _forward, _fake_forward)
_backward_operator = define_operator("causal_conv_backward", _backward, _fake_backward)
torch.library.register_autograd("mambatrain::causal_conv", _differentiate, setup_context=_save)
