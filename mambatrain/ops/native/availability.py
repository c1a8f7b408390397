"""Whether the native operators run on a device, and what they are there."""

from __future__ import annotations

import torch

from mambatrain.ops.native.cpu import library
from mambatrain.ops.native.cuda import launching, programs
from mambatrain.ops.native.operators import describe_floats

CPU = torch.device("cpu")


def why_unavailable(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> str | None:
    """Why they cannot run on a device and in a dtype, as a clause; None where they can."""
    if device.type not in ("cpu", "cuda"):
        return f"there are none for {device.type}"
    floats = tuple(library.FLOATS if device.type == "cpu" else programs.ELEMENTS)
    if dtype not in floats:
        return f"they compute {describe_floats(floats)}, and the model is {str(dtype).removeprefix('torch.')}"
    return library.why_unavailable() if device.type == "cpu" else launching.why_unavailable(device)


def describe(device: torch.device) -> str:
    """What runs on a device where it can, a sentence for people."""
    if device.type == "cpu":
        return f"C++ for this processor: {library.describe_library()}"
    return f"CUDA C++ compiled for {launching.describe_device(device)}"
