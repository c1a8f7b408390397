"""Mamba-1's scan by `kernels/cpu/selective_scan_{forward,backward}.cpp`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mambatrain.ops.native.cpu.library import FLOATS, View, load_library, vector_width, view
from mambatrain.ops.native.inputs import ScanInputs
from mambatrain.ops.native.operators import address, full_precision, readable

__all__ = ["FLOATS", "backward", "entries_shape", "forward"]

CHUNK = 32  # positions, as in kernels/cpu/selective_scan.h
STATES_STEP = 8


class _Arguments(ctypes.Structure):
    """ScanArguments of `kernels/cpu/selective_scan.h`: the same fields in the same order."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "length", "channels", "states", "num_threads")),
        *((name, View) for name in ("u", "dt", "z", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "initial_state", "boundaries", "entries")),
        ("out", View),
        ("final_state", ctypes.c_void_p),
        ("grad_out", View),
        ("grad_state", ctypes.c_void_p),
        *((name, View) for name in ("du", "ddt", "dz", "dB", "dC")),
        *((name, ctypes.c_void_p) for name in ("dA", "dD", "dbias", "dinitial")),
    )


def entries_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Of the states at the entry of each chunk, as the C++ lays them out."""
    (rows, length, channels), states, width = u.shape, A.shape[1], vector_width()
    vectors, chunks = (channels + width - 1) // width, (length + CHUNK - 1) // CHUNK
    padded = (states + STATES_STEP - 1) // STATES_STEP * STATES_STEP
    return rows, vectors, chunks, padded, width


def forward(inputs: ScanInputs, out: Tensor, state: Tensor, entries: Tensor | None) -> None:
    """Writes the output, the final state and, where wanted, the states at the entry of each chunk."""
    inputs = inputs.readable()
    arguments = _arguments(inputs)
    arguments.entries = address(entries)
    arguments.out, arguments.final_state = view(out), address(state)
    load_library().selective_scan_forward(ctypes.byref(arguments))


def backward(
    inputs: ScanInputs, grad_out: Tensor | None, grad_state: Tensor | None, entries: Tensor, gradients: ScanInputs
) -> None:
    """Writes the gradients; those of parameters and states are fp32."""
    inputs = inputs.readable()
    arguments = _arguments(inputs)
    grad_out = None if grad_out is None else readable(grad_out)
    grad_state = full_precision(grad_state)
    arguments.entries = address(entries)
    arguments.grad_out, arguments.grad_state = view(grad_out), address(grad_state)
    arguments.du, arguments.ddt, arguments.dz = view(gradients.u), view(gradients.dt), view(gradients.z)
    arguments.dB, arguments.dC = view(gradients.B), view(gradients.C)
    arguments.dA, arguments.dD = address(gradients.A), address(gradients.D)
    arguments.dbias, arguments.dinitial = address(gradients.dt_bias), address(gradients.initial_state)
    load_library().selective_scan_backward(ctypes.byref(arguments))


def _arguments(inputs: ScanInputs) -> _Arguments:
    """What forward and backward share; it points to the memory of the inputs."""
    u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state = inputs
    return _Arguments(
        *(*u.shape, A.shape[1], torch.get_num_threads()),
        *(view(u), view(dt), view(z), view(B), view(C)),
        *(address(A), address(D), address(dt_bias), address(initial_state), address(boundaries), None),
    )
