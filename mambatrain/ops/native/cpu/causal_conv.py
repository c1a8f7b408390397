"""Depthwise causal convolution and SiLU by `kernels/cpu/causal_conv_{forward,backward}.cpp`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mambatrain.ops.native.cpu.library import FLOATS, View, load_library, view
from mambatrain.ops.native.inputs import ConvInputs
from mambatrain.ops.native.operators import address, full_precision, readable

__all__ = ["FLOATS", "backward", "forward"]


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


def forward(inputs: ConvInputs, out: Tensor, window: Tensor) -> None:
    """Writes the output and the window behind the last position."""
    inputs = inputs.readable()
    arguments = _arguments(inputs)
    arguments.out, arguments.final_window = view(out), view(window)
    load_library().causal_conv_forward(ctypes.byref(arguments))


def backward(inputs: ConvInputs, grad_out: Tensor | None, grad_window: Tensor | None, gradients: ConvInputs) -> None:
    """Writes the gradients; those of parameters and windows are fp32."""
    inputs = inputs.readable()
    arguments = _arguments(inputs)
    grad_out = None if grad_out is None else readable(grad_out)
    grad_window = full_precision(grad_window)
    arguments.grad_out, arguments.grad_window = view(grad_out), view(grad_window)
    arguments.dx, arguments.dinitial = view(gradients.x), view(gradients.initial_window)
    arguments.dweight, arguments.dbias = address(gradients.weight), address(gradients.bias)
    load_library().causal_conv_backward(ctypes.byref(arguments))


def _arguments(inputs: ConvInputs) -> _Arguments:
    """What forward and backward share; it points to the memory of the inputs."""
    x, weight, bias, boundaries, initial_window = inputs
    return _Arguments(
        *(*x.shape, weight.shape[1], torch.get_num_threads()),
        *(view(x), view(initial_window), address(weight), address(bias), address(boundaries)),
    )
