"""Triton's interpreter, with what it lacks: bf16 as a GPU has it, and a pace that a test suite can afford.

Importing this changes it, in a process where TRITON_INTERPRET is set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter


def widen(handle: Any) -> Any:
    """A bf16 tensor, which the interpreter keeps as its bits, as fp32."""
    if handle.dtype.scalar != interpreter.tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)


def product_of_values(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
    """The interpreter multiplies the bits of bf16 as if they were integers."""
    return create_dot(self, widen(a), widen(b), total, *rest)


def cast_to_nearest(self: Any, source: Any, target: Any) -> Any:
    """The interpreter cuts fp32 off to bf16; a GPU rounds to the nearest."""
    if (source.dtype.scalar, target.scalar) != (interpreter.tl.float32, interpreter.tl.bfloat16):
        return cast_impl(self, source, target)
    bits = torch.from_numpy(np.ascontiguousarray(source.data, np.float32)).bfloat16().view(torch.uint16).numpy()
    return interpreter.TensorHandle(bits.reshape(source.data.shape), interpreter.tl.bfloat16)


def call_patching_once(self: Any, *arguments: Any, **options: Any) -> None:
    """The interpreter replaces the language in a module each time one of its functions is called; once will do."""
    patched = set()

    def patch_once(function: Any) -> Any:
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch_language(function)

    interpreter._patch_lang = patch_once
    try:
        call(self, *arguments, **options)
    finally:
        interpreter._patch_lang = patch_language


create_dot = interpreter.InterpreterBuilder.create_dot
cast_impl = interpreter.InterpreterBuilder.cast_impl
call = interpreter.GridExecutor.__call__
patch_language = interpreter._patch_lang
interpreter.InterpreterBuilder.create_dot = product_of_values
interpreter.InterpreterBuilder.cast_impl = cast_to_nearest
interpreter.GridExecutor.__call__ = call_patching_once
np.seterr(all="ignore")  # numpy warns where a GPU computes an inf
