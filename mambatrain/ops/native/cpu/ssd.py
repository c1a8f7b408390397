"""Mamba-2's scan by `kernels/cpu/ssd_{forward,backward}.cpp`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mambatrain.ops.native.cpu.library import FLOATS, View, load_library, view
from mambatrain.ops.native.operators import address, define_operator, full_precision, readable
from mambatrain.ops.shapes import check_ssd

CHUNK = 128  # positions, as SSD_CHUNK in kernels/cpu/ssd.h


class _HeadView(ctypes.Structure):
    """A tensor (rows, length, heads, size) whose last dimension is contiguous; all zeros: absent."""

    _fields_ = (("view", View), ("head_stride", ctypes.c_int64))


class _Arguments(ctypes.Structure):
    """SSDArguments of `kernels/cpu/ssd.h`: the same fields in the same order."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "length", "heads", "groups", "channels", "states", "num_threads")
        ),
        *((name, _HeadView) for name in ("x", "B", "C")),
        ("dt", View),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "initial_state", "boundaries", "entries")),
        ("out", _HeadView),
        ("final_state", ctypes.c_void_p),
        ("grad_out", _HeadView),
        ("grad_state", ctypes.c_void_p),
        *((name, _HeadView) for name in ("dx", "dB", "dC")),
        ("ddt", View),
        *((name, ctypes.c_void_p) for name in ("dA", "dD", "dbias", "dinitial")),
    )


def ssd(
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
) -> tuple[Tensor, Tensor]:
    """The scan of `reference.ssd`: same arguments, same results, differentiable once.

    Args:
        x: (B, L, H, P) float32 or bfloat16, like dt, B and C; all may be views whose last dimension is contiguous.
        dt: (B, L, H) raw delta, before bias and softplus.
        A: (H,), negative.
        B: (B, L, G, N).
        C: (B, L, G, N).
        D: (H,) skip.
        dt_bias: (H,).
        boundaries: (B, L) bool.
        initial_state: (B, H, P, N).

    Returns:
        y (B, L, H, P) in the dtype of x, and the state behind the last position (B, H, P, N) in fp32.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device; nothing was computed.
    """
    check_ssd(x, dt, A, B, C, D, dt_bias, boundaries, initial_state)
    for name, tensor in (("x", x), ("dt", dt), ("B", B), ("C", C)):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"ssd: {name} has dtype {tensor.dtype}, but native kernels take float32 and bfloat16")
    floats = (x, dt, A, B, C, D, dt_bias, initial_state)
    keep_entries = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in floats)
    y, state, _ = _forward_operator(x, dt, A, B, C, D, dt_bias, boundaries, initial_state, keep_entries)
    return y, state


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    boundaries: Tensor | None,
    initial_state: Tensor | None,
    keep_entries: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out, state, entries = _empty_results(x, B, keep_entries)
    arguments, _kept = _arguments(x, dt, A, B, C, D, dt_bias, boundaries, initial_state)
    arguments.entries = address(entries) if keep_entries else None
    arguments.out, arguments.final_state = _head_view(out), address(state)
    load_library().ssd_forward(ctypes.byref(arguments))
    return out, state, entries


def _fake_forward(x, dt, A, B, C, D, dt_bias, boundaries, initial_state, keep_entries):  # type: ignore[no-untyped-def]
    return _empty_results(x, B, keep_entries)


def _backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    entries: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    boundaries: Tensor | None,
    initial_state: Tensor | None,
) -> list[Tensor]:
    gradients = _empty_gradients(x, dt, A, B, C, initial_state)
    dx, ddt, dA, dB, dC, dD, dbias, dinitial = gradients
    arguments, _kept = _arguments(x, dt, A, B, C, D, dt_bias, boundaries, initial_state)
    grad_out = None if grad_out is None else readable(grad_out)
    grad_state = full_precision(grad_state)
    arguments.entries = address(entries)
    arguments.grad_out, arguments.grad_state = _head_view(grad_out), address(grad_state)
    arguments.dx, arguments.dB, arguments.dC = _head_view(dx), _head_view(dB), _head_view(dC)
    arguments.ddt = view(ddt)
    arguments.dA, arguments.dD, arguments.dbias = address(dA), address(dD), address(dbias)
    arguments.dinitial = None if initial_state is None else address(dinitial)
    load_library().ssd_backward(ctypes.byref(arguments))
    return gradients


def _fake_backward(grad_out, grad_state, entries, x, dt, A, B, C, D, dt_bias, boundaries, initial_state):  # type: ignore[no-untyped-def]
    return _empty_gradients(x, dt, A, B, C, initial_state)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _keep_entries = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(
    ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, dt_bias, boundaries, initial_state, entries = ctx.saved_tensors
    dx, ddt, dA, dB, dC, dD, dbias, dinitial = _backward_operator(
        grad_out, grad_state, entries, x, dt, A, B, C, D, dt_bias, boundaries, initial_state
    )
    return (
        dx,
        ddt,
        dA.to(A.dtype),
        dB,
        dC,
        None if D is None else dD.to(D.dtype),
        None if dt_bias is None else dbias.to(dt_bias.dtype),
        None,
        None if initial_state is None else dinitial.to(initial_state.dtype),
        None,
    )


def _empty_results(x: Tensor, B: Tensor, keep_entries: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out, the final state, and the states at the entry of each chunk."""
    (rows, length, heads, channels), states = x.shape, B.shape[3]
    entries = (rows, heads, (length + CHUNK - 1) // CHUNK, channels, states) if keep_entries else (0,)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((rows, heads, channels, states), dtype=torch.float32),
        x.new_empty(entries, dtype=torch.float32),
    )


def _empty_gradients(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> list[Tensor]:
    """Of x, dt, A, B, C, D, bias and initial state, in their order; parameters' and states' in fp32."""
    dx, ddt, dB, dC = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, dt, B, C))
    dA, dD, dbias = (A.new_empty(A.shape, dtype=torch.float32) for _ in range(3))
    size = (0,) if initial_state is None else initial_state.shape
    return [dx, ddt, dA, dB, dC, dD, dbias, A.new_empty(size, dtype=torch.float32)]


def _arguments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    boundaries: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[_Arguments, tuple[Tensor | None, ...]]:
    """What forward and backward share, and the tensors whose memory it points to: keep them until C++ is done."""
    x, dt, B, C = readable(x), readable(dt), readable(B), readable(C)
    A = A.float().contiguous()
    D, dt_bias, initial_state = map(full_precision, (D, dt_bias, initial_state))
    boundaries = None if boundaries is None else boundaries.contiguous()
    rows, length, heads, channels = x.shape
    arguments = _Arguments(
        *(rows, length, heads, B.shape[2], channels, B.shape[3], torch.get_num_threads()),
        *(_head_view(x), _head_view(B), _head_view(C), view(dt)),
        *(address(A), address(D), address(dt_bias), address(initial_state), address(boundaries), None),
    )
    return arguments, (x, dt, A, B, C, D, dt_bias, boundaries, initial_state)


def _head_view(tensor: Tensor | None) -> _HeadView:
    return _HeadView() if tensor is None else _HeadView(view(tensor), tensor.stride(2))


_forward_operator = define_operator("ssd", _forward, _fake_forward)
_backward_operator = define_operator("ssd_backward", _backward, _fake_backward)
torch.library.register_autograd("mambatrain::ssd", _differentiate, setup_context=_save)
