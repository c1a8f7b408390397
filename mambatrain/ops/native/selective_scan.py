"""Mamba-1's scan by `kernels/cpu/selective_scan_{forward,backward}.cpp`."""

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
    vector_width,
    view,
)
from mambatrain.ops.shapes import check_selective_scan

CHUNK = 32  # positions, as in kernels/cpu/selective_scan.h
STATES_STEP, MAX_STATES = 8, 256


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


def selective_scan(
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
) -> tuple[Tensor, Tensor]:
    """The scan of `reference.selective_scan`: same arguments, same results, differentiable once.

    Args:
        u: (B, L, E) float32 or bfloat16, like dt, B, C and z; all may be views whose last dimension is contiguous.
        dt: (B, L, E) raw delta, before bias and softplus.
        A: (E, N), negative, N up to 256.
        B: (B, L, N).
        C: (B, L, N).
        D: (E,) skip.
        z: (B, L, E) gate.
        dt_bias: (E,).
        boundaries: (B, L) bool.
        initial_state: (B, E, N).

    Returns:
        out (B, L, E) in the dtype of u, and the state behind the last position (B, E, N) in fp32.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device; nothing was computed.
    """
    check_selective_scan(u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state)
    for name, tensor in (("u", u), ("dt", dt), ("B", B), ("C", C), ("z", z)):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise ValueError(
                f"selective_scan: {name} has dtype {tensor.dtype}, but native kernels take float32 and bfloat16"
            )
    if not 1 <= A.shape[1] <= MAX_STATES:
        raise ValueError(f"selective_scan: A has shape {tuple(A.shape)}, but N should be 1 to {MAX_STATES}")
    floats = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    keep_entries = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    out, state, _ = _forward_operator(u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state, keep_entries)
    return out, state


def _forward(
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
    keep_entries: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out, state, entries = _empty_results(u, A, keep_entries)
    arguments, _kept = _arguments(u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state)
    arguments.entries = address(entries) if keep_entries else None
    arguments.out, arguments.final_state = view(out), address(state)
    load_library().selective_scan_forward(ctypes.byref(arguments))
    return out, state, entries


def _fake_forward(u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state, keep_entries):  # type: ignore[no-untyped-def]
    return _empty_results(u, A, keep_entries)


def _backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    entries: Tensor,
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
) -> list[Tensor]:
    gradients = _empty_gradients(u, dt, A, B, C, D, z, dt_bias, initial_state)
    du, ddt, dA, dB, dC, dD, dz, dbias, dinitial = gradients
    arguments, _kept = _arguments(u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state)
    grad_out = None if grad_out is None else readable(grad_out)
    grad_state = full_precision(grad_state)
    arguments.entries = address(entries)
    arguments.grad_out, arguments.grad_state = view(grad_out), address(grad_state)
    arguments.du, arguments.ddt, arguments.dB, arguments.dC = view(du), view(ddt), view(dB), view(dC)
    arguments.dz = View() if z is None else view(dz)
    arguments.dA, arguments.dD, arguments.dbias = address(dA), address(dD), address(dbias)
    arguments.dinitial = None if initial_state is None else address(dinitial)
    load_library().selective_scan_backward(ctypes.byref(arguments))
    return gradients


def _fake_backward(grad_out, grad_state, entries, u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state):  # type: ignore[no-untyped-def]
    return _empty_gradients(u, dt, A, B, C, D, z, dt_bias, initial_state)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _keep_entries = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(
    ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state, entries = ctx.saved_tensors
    du, ddt, dA, dB, dC, dD, dz, dbias, dinitial = _backward_operator(
        grad_out, grad_state, entries, u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state
    )
    return (
        du,
        ddt,
        dA.to(A.dtype),
        dB,
        dC,
        None if D is None else dD.to(D.dtype),
        None if z is None else dz,
        None if dt_bias is None else dbias.to(dt_bias.dtype),
        None,
        None if initial_state is None else dinitial.to(initial_state.dtype),
        None,
    )


def _empty_results(u: Tensor, A: Tensor, keep_entries: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out, the final state, and the states at the entry of each chunk as the C++ lays them out."""
    (rows, length, channels), states, width = u.shape, A.shape[1], vector_width()
    vectors, chunks = (channels + width - 1) // width, (length + CHUNK - 1) // CHUNK
    padded = (states + STATES_STEP - 1) // STATES_STEP * STATES_STEP
    entries = (rows, vectors, chunks, padded, width) if keep_entries else (0,)
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        u.new_empty((rows, channels, states), dtype=torch.float32),
        u.new_empty(entries, dtype=torch.float32),
    )


def _empty_gradients(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> list[Tensor]:
    """Of each float argument, in their order; parameters' and states' in fp32; of an absent one an empty tensor."""
    parts = []
    for tensor, dtype in (
        *((x, None) for x in (u, dt)),
        (A, torch.float32),
        (B, None),
        (C, None),
        (D, torch.float32),
        (z, None),
        (dt_bias, torch.float32),
        (initial_state, torch.float32),
    ):
        if tensor is None:
            parts.append(u.new_empty(0))
        else:
            parts.append(torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format))
    return parts


def _arguments(
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
) -> tuple[_Arguments, tuple[Tensor | None, ...]]:
    """What forward and backward share, and the tensors whose memory it points to: keep them until C++ is done."""
    u, dt, B, C = readable(u), readable(dt), readable(B), readable(C)
    z = None if z is None else readable(z)
    A = A.float().contiguous()
    D, dt_bias, initial_state = map(full_precision, (D, dt_bias, initial_state))
    boundaries = None if boundaries is None else boundaries.contiguous()
    rows, length, channels = u.shape
    arguments = _Arguments(
        rows,
        length,
        channels,
        A.shape[1],
        torch.get_num_threads(),
        view(u),
        view(dt),
        view(z),
        view(B),
        view(C),
        address(A),
        address(D),
        address(dt_bias),
        address(initial_state),
        address(boundaries),
        None,
    )
    return arguments, (u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state)


_forward_operator = define_operator("selective_scan", _forward, _fake_forward)
_backward_operator = define_operator("selective_scan_backward", _backward, _fake_backward)
torch.library.register_autograd("mambatrain::selective_scan", _differentiate, setup_context=_save)
