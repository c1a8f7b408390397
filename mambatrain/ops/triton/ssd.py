"""Mamba-2's scan on CUDA in Triton, as an operator of torch. Not yet run on a GPU: its kernels are compiled for four
architectures and interpreted on the CPU by the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambatrain.ops.native.operators import full_precision
from mambatrain.ops.shapes import check_ssd
from mambatrain.ops.triton import steps
from mambatrain.ops.triton.steps import on_device_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_SIZE = 256  # channels of a head, and states


def why_unavailable() -> str | None:
    """Why the kernels cannot run on CUDA, as a clause; None where they can. Imports triton."""
    try:
        import mambatrain.ops.triton.launch  # noqa: F401
    except ImportError as error:
        return f"Mamba-2's scan needs Triton, which torch for CUDA brings along on Linux: {error}"
    return None


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
        x: (B, L, H, P) float32, bfloat16 or float16, like dt, B and C; views whose last dimension is contiguous are
            read where they lie.
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
            raise ValueError(
                f"ssd: {name} has dtype {tensor.dtype}, but Triton kernels take float32, bfloat16 and float16"
            )
    for letter, size in (("P", x.shape[3]), ("N", B.shape[3])):
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"ssd: {letter} should be 1 to {MAX_SIZE}, but is {size}")
    y, state = _forward_operator(x, dt, A, B, C, D, dt_bias, boundaries, initial_state)
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
) -> tuple[Tensor, Tensor]:
    from mambatrain.ops.triton.arguments import Inputs, readable
    from mambatrain.ops.triton.launch import run_forward

    y, state = _empty_results(x, B)
    if steps.is_step(x):  # backward, which computes everything again, does not mind
        D, dt_bias, initial_state = map(full_precision, (D, dt_bias, initial_state))
        views = readable(x), readable(dt), A.float().contiguous(), readable(B), readable(C)
        steps.step_ssd(*views, D, dt_bias, boundaries, initial_state, y, state)
        return y, state
    with on_device_of(x):
        run_forward(Inputs.of(x, dt, A, B, C, D, dt_bias, boundaries, initial_state), y, state)
    return y, state


def _fake_forward(x, dt, A, B, C, D, dt_bias, boundaries, initial_state):  # type: ignore[no-untyped-def]
    return _empty_results(x, B)


def _backward(
    grad_y: Tensor | None,
    grad_state: Tensor | None,
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
    from mambatrain.ops.triton.arguments import Inputs
    from mambatrain.ops.triton.launch import run_backward

    gradients = _empty_gradients(x, dt, A, B, C, initial_state)
    with on_device_of(x):
        inputs = Inputs.of(x, dt, A, B, C, D, dt_bias, boundaries, initial_state)
        run_backward(inputs, torch.zeros_like(x) if grad_y is None else grad_y, grad_state, gradients)
    return gradients


def _fake_backward(grad_y, grad_state, x, dt, A, B, C, D, dt_bias, boundaries, initial_state):  # type: ignore[no-untyped-def]
    return _empty_gradients(x, dt, A, B, C, initial_state)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: what activation checkpointing computes again is handed out a single time
    _x, _dt, A, _B, _C, D, dt_bias, _boundaries, initial_state = saved
    dx, ddt, dA, dB, dC, dD, dbias, dinitial = _backward_operator(grad_y, grad_state, *saved)
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
    )


def _empty_results(x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    rows, _, heads, channels = x.shape
    state = x.new_empty((rows, heads, channels, B.shape[3]), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), state


def _empty_gradients(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> list[Tensor]:
    """Of x, dt, A, B, C, D, bias and initial state, in their order; parameters' and states' in fp32."""
    dx, ddt, dB, dC = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, dt, B, C))
    dA, dD, dbias = (A.new_empty(A.shape, dtype=torch.float32) for _ in range(3))
    state = (x.shape[0], *x.shape[2:], B.shape[3])
    return [dx, ddt, dA, dB, dC, dD, dbias, A.new_empty(state, dtype=torch.float32)]


def _define(name: str, kernel: Any, fake: Any) -> Any:
    """As in `ops/native`, by the parts of `torch.library.custom_op`. On CPUs kernels run under Triton's interpreter."""
    qualified = f"mambatrain::{name}"
    torch.library.define(qualified, torch.library.infer_schema(kernel, mutates_args=()))
    torch.library.impl(qualified, ("CPU", "CUDA"))(kernel)
    torch.library.register_fake(qualified)(fake)
    return getattr(torch.ops.mambatrain, name).default


_forward_operator = _define("ssd_triton", _forward, _fake_forward)
_backward_operator = _define("ssd_triton_backward", _backward, _fake_backward)
torch.library.register_autograd("mambatrain::ssd_triton", _differentiate, setup_context=_save)
