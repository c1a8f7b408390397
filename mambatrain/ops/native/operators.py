"""What the bindings of every device share: an operator's definition, and tensors as kernels take them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def define_operator(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("CPU",),
) -> Callable[..., Any]:
    """The operator `torch.ops.mambatrain.NAME` on the devices; `fake` makes its results without their values.

    By the parts of `torch.library.custom_op`: the whole imports torch._dynamo at the first call, which takes a second.
    """
    qualified = f"mambatrain::{name}"
    torch.library.define(qualified, torch.library.infer_schema(kernel, mutates_args=mutates))
    for device in devices:
        torch.library.impl(qualified, device)(kernel)
    torch.library.register_fake(qualified)(fake)
    operator: Callable[..., Any] = getattr(torch.ops.mambatrain, name).default
    return operator


def address(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor, None of an absent one."""
    return None if tensor is None else tensor.data_ptr()


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous (a slice of a projection is), else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def full_precision(tensor: Tensor | None) -> Tensor | None:
    """A parameter or a state as kernels take it: fp32, contiguous."""
    return None if tensor is None else tensor.float().contiguous()


def describe_floats(floats: Iterable[torch.dtype]) -> str:
    """For people: `float32 and bfloat16`."""
    *names, last = (str(dtype).removeprefix("torch.") for dtype in floats)
    return f"{', '.join(names)} and {last}"
