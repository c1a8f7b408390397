"""Depthwise causal convolution and SiLU by `kernels/cuda/causal_conv_{forward,backward}.cu`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mambatrain.ops.native.cuda import launching
from mambatrain.ops.native.cuda.programs import ELEMENTS, THREADS, Program
from mambatrain.ops.native.cuda.tensors import View, as_dtype, can_pack, view
from mambatrain.ops.native.inputs import ConvInputs
from mambatrain.ops.native.operators import address, full_precision
from mambatrain.ops.triton import steps

FLOATS = tuple(ELEMENTS)
PACK = 2  # channels of a thread, where memory allows
SPAN = 64  # positions of a block


class _Arguments(ctypes.Structure):
    """ConvArguments of `kernels/cuda/causal_conv.cuh`: the same fields in the same order."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "length", "channels")),
        ("x", View),
        *((name, ctypes.c_void_p) for name in ("initial_window", "weight", "bias", "boundaries")),
        ("out", View),
        ("final_window", ctypes.c_void_p),
        ("grad_out", View),
        ("grad_window", ctypes.c_void_p),
        ("dx", View),
        *((name, ctypes.c_void_p) for name in ("dinitial", "sums")),
    )


def forward(inputs: ConvInputs, out: Tensor, window: Tensor) -> None:
    """Writes the output and the window behind the last position."""
    inputs = inputs.readable()
    if steps.is_step(inputs.x):  # backward, which reads the inputs alone, does not mind
        steps.step_conv(*inputs, out, window)
        return
    arguments = _arguments(inputs)
    arguments.out, arguments.final_window = view(out), address(window)
    pack = PACK if can_pack(PACK, inputs.x, out) else 1
    program = make_program("forward", inputs.x.dtype, inputs.weight.shape[1], pack)
    launching.launch(program, "causal_conv_forward", _num_blocks(inputs.x, pack), arguments, inputs.x.device)


def backward(inputs: ConvInputs, grad_out: Tensor | None, grad_window: Tensor | None, gradients: ConvInputs) -> None:
    """Writes the gradients; those of parameters and windows are fp32."""
    inputs = inputs.readable()
    x, taps = inputs.x, inputs.weight.shape[1]
    grad_out, grad_window = as_dtype(grad_out, x.dtype), full_precision(grad_window)
    sums = inputs.weight.new_empty(x.shape[0] * _num_spans(x), taps + 1, x.shape[2])
    arguments = _arguments(inputs)
    arguments.grad_out, arguments.grad_window = view(grad_out), address(grad_window)
    arguments.dx, arguments.dinitial = view(gradients.x), address(gradients.initial_window)
    arguments.sums = address(sums)
    pack = PACK if can_pack(PACK, x, grad_out, gradients.x) else 1
    program = make_program("backward", x.dtype, taps, pack)
    launching.launch(program, "causal_conv_backward", _num_blocks(x, pack), arguments, x.device)
    total = sums.sum(0)  # (W + 1, D)
    gradients.weight.copy_(total[:taps].T)
    if gradients.bias is not None:
        gradients.bias.copy_(total[taps])


def make_program(name: str, dtype: torch.dtype, taps: int, pack: int) -> Program:
    """The source causal_conv_NAME."""
    return Program.of(f"causal_conv_{name}.cu", dtype, {"TAPS": taps, "PACK": pack, "SPAN": SPAN}, _Arguments)


def _num_spans(x: Tensor) -> int:
    return max(1, -(-x.shape[1] // SPAN))  # of an empty row the window is handed on


def _num_blocks(x: Tensor, pack: int) -> int:
    return x.shape[0] * _num_spans(x) * -(-x.shape[2] // (THREADS * pack))


def _arguments(inputs: ConvInputs) -> _Arguments:
    """What forward and backward share; it points to the memory of the inputs."""
    x, weight, bias, boundaries, initial_window = inputs
    return _Arguments(
        *(*x.shape, view(x), address(initial_window), address(weight), address(bias), address(boundaries)),
    )
