"""Depthwise causal convolution and SiLU as an operator of torch, on CPUs and on CUDA."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mambatrain.ops.native.cpu import causal_conv as cpu
from mambatrain.ops.native.cuda import causal_conv as cuda
from mambatrain.ops.native.inputs import ConvInputs
from mambatrain.ops.native.operators import define_operator, describe_floats
from mambatrain.ops.shapes import check_causal_conv

MAX_TAPS = 4

IMPLEMENTATIONS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda}


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
        x: (B, L, D) float32 or bfloat16, on CUDA float16 too; it may be a view whose last dimension is contiguous.
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
    floats = _implementation(x).FLOATS
    if x.dtype not in floats:
        raise ValueError(f"causal_conv: x has dtype {x.dtype}, but native kernels take {describe_floats(floats)}")
    if weight.shape[1] > MAX_TAPS:
        raise ValueError(f"causal_conv: weight has shape {tuple(weight.shape)}, but W should be 1 to {MAX_TAPS}")
    out, window = _forward_operator(x, weight, bias, boundaries, initial_window)
    return out, window


def _implementation(x: Tensor) -> ModuleType:
    return IMPLEMENTATIONS.get(x.device.type, cpu)  # what has no device has no memory either: any will do


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, boundaries: Tensor | None, initial_window: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, window = _fake_forward(x, weight, bias, boundaries, initial_window)
    _implementation(x).forward(ConvInputs(x, weight, bias, boundaries, initial_window), out, window)
    return out, window


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, boundaries: Tensor | None, initial_window: Tensor | None
) -> tuple[Tensor, Tensor]:
    window = x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), window


def _backward(
    grad_out: Tensor | None,
    grad_window: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    boundaries: Tensor | None,
    initial_window: Tensor | None,
) -> list[Tensor]:
    inputs = ConvInputs(x, weight, bias, boundaries, initial_window)
    dx, dweight, dbias, dinitial = gradients = _empty_gradients(inputs)
    given = ConvInputs(dx, dweight, None if bias is None else dbias, None, None if initial_window is None else dinitial)
    _implementation(x).backward(inputs, grad_out, grad_window, given)
    return gradients


def _fake_backward(grad_out, grad_window, *inputs):  # type: ignore[no-untyped-def]
    return _empty_gradients(ConvInputs(*inputs))


def _empty_gradients(inputs: ConvInputs) -> list[Tensor]:
    """Of x in its dtype, of weight, bias and initial window in fp32; of an absent one an empty tensor."""
    return [
        torch.empty_like(inputs.x, memory_format=torch.contiguous_format),
        *(
            inputs.x.new_empty(0 if tensor is None else tensor.shape, dtype=torch.float32)
            for tensor in (inputs.weight, inputs.bias, inputs.initial_window)
        ),
    ]


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


_forward_operator = define_operator("causal_conv", _forward, _fake_forward, devices=("CPU", "CUDA"))
_backward_operator = define_operator("causal_conv_backward", _backward, _fake_backward, devices=("CPU", "CUDA"))
torch.library.register_autograd("mambatrain::causal_conv", _differentiate, setup_context=_save)
