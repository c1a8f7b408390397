"""Mamba-1's scan as an operator of torch, on CPUs and on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mambatrain.ops.native.cpu import selective_scan as cpu
from mambatrain.ops.native.cuda import selective_scan as cuda
from mambatrain.ops.native.inputs import ScanInputs
from mambatrain.ops.native.operators import define_operator, describe_floats
from mambatrain.ops.shapes import check_selective_scan

MAX_STATES = 256

IMPLEMENTATIONS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda}


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
        u: (B, L, E) float32 or bfloat16, on CUDA float16 too, like dt, B, C and z; all may be views whose last
            dimension is contiguous.
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
    floats = _implementation(u).FLOATS
    for name, tensor in (("u", u), ("dt", dt), ("B", B), ("C", C), ("z", z)):
        if tensor is not None and tensor.dtype not in floats:
            raise ValueError(
                f"selective_scan: {name} has dtype {tensor.dtype}, but native kernels take {describe_floats(floats)}"
            )
    if not 1 <= A.shape[1] <= MAX_STATES:
        raise ValueError(f"selective_scan: A has shape {tuple(A.shape)}, but N should be 1 to {MAX_STATES}")
    differentiable = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    keep_entries = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    out, state, _ = _forward_operator(u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state, keep_entries)
    return out, state


@contextmanager
def keeping_as_on(device_type: str) -> Iterator[None]:
    """Within, a scan of fake tensors keeps for its backward pass what it keeps on that device; to plan for another."""
    own = IMPLEMENTATIONS["cpu"]
    IMPLEMENTATIONS["cpu"] = IMPLEMENTATIONS[device_type]
    try:
        yield
    finally:
        IMPLEMENTATIONS["cpu"] = own


def _implementation(u: Tensor) -> ModuleType:
    return IMPLEMENTATIONS.get(u.device.type, cpu)  # what has no device has no memory either: any will do


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
    inputs = ScanInputs(u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state)
    _implementation(u).forward(inputs, out, state, entries if keep_entries else None)
    return out, state, entries


def _fake_forward(u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state, keep_entries):  # type: ignore[no-untyped-def]
    return _empty_results(u, A, keep_entries)


def _empty_results(u: Tensor, A: Tensor, keep_entries: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out, the final state, and the states at the entry of each chunk."""
    entries = _implementation(u).entries_shape(u, A) if keep_entries else (0,)
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        u.new_empty((u.shape[0], *A.shape), dtype=torch.float32),
        u.new_empty(entries, dtype=torch.float32),
    )


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
    inputs = ScanInputs(u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state)
    gradients = _empty_gradients(inputs)
    _implementation(u).backward(inputs, grad_out, grad_state, entries, gradients)
    return [u.new_empty(0) if gradient is None else gradient for gradient in _differentiable(gradients)]


def _fake_backward(grad_out, grad_state, entries, *inputs):  # type: ignore[no-untyped-def]
    gradients = _differentiable(_empty_gradients(ScanInputs(*inputs)))
    return [inputs[0].new_empty(0) if gradient is None else gradient for gradient in gradients]


def _empty_gradients(inputs: ScanInputs) -> ScanInputs:
    """One for each float that is there; of parameters and states in fp32."""
    full = dict.fromkeys(("A", "D", "dt_bias", "initial_state"), torch.float32)
    made: dict[str, Any] = {
        name: None
        if tensor is None or name == "boundaries"
        else torch.empty_like(tensor, dtype=full.get(name), memory_format=torch.contiguous_format)
        for name, tensor in inputs._asdict().items()
    }
    return ScanInputs(**made)


def _differentiable(gradients: ScanInputs) -> list[Tensor | None]:
    return [gradient for name, gradient in gradients._asdict().items() if name != "boundaries"]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _keep_entries = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(
    ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, entries = ctx.saved_tensors
    gradients = iter(_backward_operator(grad_out, grad_state, entries, *inputs))
    returned: list[Tensor | None] = []
    for name, tensor in ScanInputs(*inputs)._asdict().items():
        gradient = None if name == "boundaries" else next(gradients)
        returned.append(None if tensor is None or gradient is None else gradient.to(tensor.dtype))
    return (*returned, None)  # keep_entries has none


_forward_operator = define_operator("selective_scan", _forward, _fake_forward, devices=("CPU", "CUDA"))
_backward_operator = define_operator("selective_scan_backward", _backward, _fake_backward, devices=("CPU", "CUDA"))
torch.library.register_autograd("mambatrain::selective_scan", _differentiate, setup_context=_save)
