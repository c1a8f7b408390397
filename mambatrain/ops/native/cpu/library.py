"""The compiled kernels of this machine, called through ctypes.

They are built when mambatrain is installed (`setup.py`), once for each level of the instruction set, and link neither
torch nor an OpenMP runtime: what they need of torch, its thread pool, is handed to them here.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
from pathlib import Path

import torch
from torch import Tensor

LEVELS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}
"""What torch calls the capability of an x86 processor -> the library compiled for it; anything else runs x86-64-v2."""

FLOATS = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes that kernels read and write, with their numbers in `kernels/cpu/simd.h`."""


class View(ctypes.Structure):
    """A tensor (rows, length, size) whose last dimension is contiguous; all zeros: absent."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("time_stride", ctypes.c_int64),
    )


def view(tensor: Tensor | None) -> View:
    """What C++ sees of a tensor that `readable` has returned or that was made contiguous."""
    if tensor is None:
        return View()
    return View(tensor.data_ptr(), FLOATS[tensor.dtype], tensor.stride(0), tensor.stride(1))


def load_library() -> ctypes.CDLL:
    """The kernels for this processor.

    Raises:
        OSError: they were not built or cannot be loaded; the message says why.
    """
    return _load(processor_level())


@functools.cache
def _load(level: str) -> ctypes.CDLL:
    path = library_path(level)
    if not path.exists():
        note = path.with_name("not_built.txt")
        raise OSError(note.read_text().strip() if note.exists() else f"{path.name} is not part of this installation")
    library = ctypes.CDLL(str(path))
    library.vector_width.restype = ctypes.c_int64
    library.set_parallel_region.argtypes = [ctypes.c_void_p]
    # libtorch_cpu is loaded already; a name looked up through it is found in the OpenMP runtime that it uses itself.
    runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    if not hasattr(runtime, "GOMP_parallel"):
        raise OSError("torch's OpenMP runtime has no GOMP_parallel, by which they would share its threads")
    library.set_parallel_region(ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p))
    return library


def why_unavailable() -> str | None:
    """Why the kernels cannot run on this machine, as a clause; None where they can."""
    try:
        load_library()
    except OSError as error:
        return str(error)
    return None


def describe_library() -> str:
    """The kernels that run here, for people: `x86-64-v4, 16 lanes`."""
    return f"{processor_level()}, {vector_width()} lanes"


def vector_width() -> int:
    """Channels in one vector of the loaded library."""
    return int(load_library().vector_width())


def processor_level() -> str:
    """The level of the instruction set whose library runs here."""
    if platform.machine() in ("aarch64", "arm64"):
        return "neon"
    return LEVELS.get(torch.backends.cpu.get_cpu_capability(), "x86-64-v2")


def library_path(level: str) -> Path:
    """Where the installation has put the library of a level, if it could build it."""
    package = importlib.util.find_spec("mambatrain._kernels")
    if package is None or package.origin is None:
        raise OSError("mambatrain is not installed, so its kernels have not been built")
    return Path(package.origin).parent / "lib" / f"mambatrain-{level}.so"
