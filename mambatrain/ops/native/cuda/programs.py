"""A source of `kernels/cuda` with its sizes filled in, compiled by NVRTC and kept in the user's cache.

NVRTC and `cuda.bindings` come with PyTorch's CUDA packages: no compiler of the machine's is needed, and no GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mambatrain.errors import UserError
from mambatrain.files import write_bytes_whole

THREADS = 128
"""Of a block, in every kernel."""

ELEMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The dtypes that kernels read and write, with their names in `kernels/cuda/intrinsics.cuh`."""

OLDEST_ARCHITECTURE = 80
"""Compute capability 8.0 (A100): the first that rounds to bf16 by itself."""

# No fused multiply-adds but those that are written: the same bits whichever way the code goes.
OPTIONS = ("-std=c++17", "-fmad=false", "--ptxas-options=-v")


@dataclass(frozen=True)
class Program:
    """One source with everything that is fixed when it is compiled."""

    source: str
    """A file of `kernels/cuda`."""
    defines: tuple[tuple[str, int | str], ...]
    shared_bytes: int = 0
    """Of a block."""

    @classmethod
    def of(
        cls,
        source: str,
        dtype: torch.dtype,
        sizes: dict[str, int],
        arguments: type[ctypes.Structure],
        shared_bytes: int = 0,
    ) -> Program:
        """The source checks the sizes of its arguments and of its shared memory against what it is told here."""
        bytes_of = {"ARGUMENTS_BYTES": ctypes.sizeof(arguments), "SHARED_BYTES": shared_bytes}
        fixed: dict[str, int | str] = {"ELEMENT": ELEMENTS[dtype], "THREADS": THREADS, **sizes, **bytes_of}
        return cls(source, tuple(fixed.items()), shared_bytes)

    def options(self) -> tuple[str, ...]:
        """For the compiler."""
        return (*OPTIONS, *(f"-D{name}={value}" for name, value in self.defines))


@dataclass(frozen=True)
class Kernel:
    """What the compiler says of one entry of a program."""

    name: str
    registers: int
    spilled_bytes: int
    stack_bytes: int


@dataclass(frozen=True)
class Cubin:
    """Machine code for one architecture."""

    code: bytes
    kernels: tuple[Kernel, ...]
    seconds: float


def why_unavailable() -> str | None:
    """Why nothing can be compiled here, as a clause; None where it can."""
    try:
        _nvrtc_version()
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines() or ["without a message"]
        return f"NVRTC cannot be loaded through cuda.bindings ({reason[0]})"
    return None


def describe_compiler() -> str:
    """The version of NVRTC: `13.5`."""
    return ".".join(map(str, _nvrtc_version()))


def load_code(program: Program, architecture: int) -> bytes:
    """The machine code of a program, from the cache or compiled and put there."""
    path = cached_path(program, architecture)
    if path.is_file():
        return path.read_bytes()
    code = compile_program(program, architecture).code
    keep(code, path)
    return code


def compile_program(program: Program, architecture: int) -> Cubin:
    """Compiles, whatever the cache holds.

    Args:
        program: what to compile.
        architecture: 90 for compute capability 9.0.

    Raises:
        UserError: NVRTC is missing, does not know the architecture, or finds an error in the source.
    """
    missing = why_unavailable()
    if missing:
        raise UserError(
            f"CUDA kernels cannot be compiled: {missing}",
            "pip install 'cuda-bindings>=13,<14' 'nvidia-cuda-nvrtc>=13,<14'",
        )
    from cuda.bindings import nvrtc

    known = _called(nvrtc.nvrtcGetSupportedArchs())
    if architecture not in known or architecture < OLDEST_ARCHITECTURE:
        able = ", ".join(str(one) for one in known if one >= OLDEST_ARCHITECTURE)
        raise UserError(
            f"CUDA kernels cannot be compiled for sm_{architecture}: NVRTC {describe_compiler()} and they know {able}",
            "a newer GPU needs a newer nvidia-cuda-nvrtc; on an older one --kernels torch runs",
        )
    began = time.perf_counter()
    sources = read_sources()
    headers = {name: text for name, text in sources.items() if name.endswith(".cuh")}
    handle = _called(
        nvrtc.nvrtcCreateProgram(
            sources[program.source].encode(),
            program.source.encode(),
            len(headers),
            [text.encode() for text in headers.values()],
            [name.encode() for name in headers],
        )
    )
    try:
        options = [option.encode() for option in (f"-arch=sm_{architecture}", *program.options())]
        (result,) = nvrtc.nvrtcCompileProgram(handle, len(options), options)
        log = (
            _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, handle)
            .decode(errors="replace")
            .strip("\0\n ")
        )
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            first = next((line for line in log.splitlines() if "error" in line), log)
            raise UserError(
                f"{program.source} does not compile for sm_{architecture}: {first}",
                "--kernels torch runs without it; report this with the versions of mambatrain and nvidia-cuda-nvrtc",
            )
        code = _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, handle)
    finally:
        nvrtc.nvrtcDestroyProgram(handle)
    return Cubin(code, _parse_kernels(log), time.perf_counter() - began)


def cached_path(program: Program, architecture: int) -> Path:
    """Where the code of a program is kept: by all that decides it."""
    parts = [*_nvrtc_version(), architecture, *program.options(), *sum(sorted(read_sources().items()), ())]
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]
    return cache_folder() / f"{program.source.removesuffix('.cu')}-sm_{architecture}-{digest}.cubin"


def cache_folder() -> Path:
    """Of this user, for every installation of mambatrain."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mambatrain" / "kernels"


def keep(code: bytes, path: Path) -> bool:
    """Puts code into the cache; a cache that cannot be written costs time at each start, and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_whole(path, code)
    except OSError:
        return False
    return True


@functools.cache
def read_sources() -> dict[str, str]:
    """File name -> text, of every file in `kernels/cuda`."""
    package = importlib.util.find_spec("mambatrain._kernels")
    if package is None or package.origin is None:
        raise UserError(
            "the sources of the CUDA kernels are missing", "install mambatrain, with pip install -e . in a checkout"
        )
    folder = Path(package.origin).parent / "cuda"
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cu*"))}


@functools.cache
def _nvrtc_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    result, *version = nvrtc.nvrtcVersion()
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcVersion: {result.name}")
    return version[0], version[1]


def _called(answer: tuple[Any, ...]) -> Any:
    """What a function of NVRTC has returned, behind its result code."""
    result, *values = answer
    if int(result) != 0:
        raise RuntimeError(f"NVRTC: {result.name}")
    return values[0] if values else None


def _read(size_of: Any, read: Any, handle: Any) -> bytes:
    buffer = bytes(_called(size_of(handle)))
    _called(read(handle, buffer))
    return buffer


def _parse_kernels(log: str) -> tuple[Kernel, ...]:
    """From what ptxas -v says."""
    found = re.findall(
        r"Function properties for (\w+)\s[^\n\d]*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        flags=re.DOTALL,
    )
    return tuple(
        Kernel(name, int(used), int(stores) + int(loads), int(stack)) for name, stack, stores, loads, used in found
    )
