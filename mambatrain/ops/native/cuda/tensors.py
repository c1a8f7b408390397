"""Tensors as CUDA kernels see them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mambatrain.ops.native.operators import readable


class View(ctypes.Structure):
    """A tensor (rows, length, size) whose last dimension is contiguous; all zeros: absent."""

    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("time_stride", ctypes.c_int64))


def view(tensor: Tensor | None) -> View:
    """What C++ sees of a tensor that `readable` has returned or that was made contiguous."""
    return View() if tensor is None else View(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """That of all of them, else float32: a kernel reads and writes one."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def as_dtype(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Of the dtype, with a contiguous last dimension."""
    return None if tensor is None else readable(tensor.to(dtype))


def can_pack(count: int, *tensors: Tensor | None) -> bool:
    """May `count` neighbouring channels be read and written at once, wherever they are?"""
    return all(
        tensor is None
        or (
            tensor.shape[-1] % count == tensor.stride(0) % count == tensor.stride(1) % count == 0
            and tensor.data_ptr() % (count * tensor.element_size()) == 0
        )
        for tensor in tensors
    )


def room_for(result: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself where a kernel can write into it, else another of its shape."""
    return result if result.dtype == dtype else torch.empty_like(result, dtype=dtype)


def write_to(result: Tensor, written: Tensor) -> None:
    """Brings what a kernel has written to where it is wanted."""
    if written is not result:
        result.copy_(written)
