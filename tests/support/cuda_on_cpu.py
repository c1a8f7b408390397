"""The CUDA kernels compiled by a C++ compiler and run on the CPU, launched by the package's own bindings.

`on_cpu` puts a launcher in the place of CUDA's: everything else, the choice of layouts, scratch memory, arguments and
grids, is what runs on a GPU.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch

from mambatrain.ops.native.cuda import causal_conv as cuda_conv
from mambatrain.ops.native.cuda import launching, programs
from mambatrain.ops.native.cuda import selective_scan as cuda_scan
from mambatrain.ops.native.cuda.programs import Program

SHIM = Path(__file__).with_name("cuda_on_cpu.h")
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
FLAGS = ("-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-w")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="this machine has no C++ compiler")


@contextmanager
def on_cpu(processors: int = 1, reversed_order: bool = False) -> Iterator[None]:
    """CPU tensors go through the CUDA bindings and kernels.

    Args:
        processors: what the device is said to have; few make the layout that a large batch has.
        reversed_order: blocks, warps and threads run from the last to the first.
    """

    def launch(
        program: Program, entry: str, num_blocks: int, arguments: ctypes.Structure, device: torch.device
    ) -> None:
        run = getattr(_load(_compile(program)), f"run_{entry}")
        counts = ctypes.c_int64(num_blocks), ctypes.c_int64(program.shared_bytes)
        run(ctypes.byref(arguments), *counts, ctypes.c_bool(reversed_order))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(import_module("mambatrain.ops.native.selective_scan").IMPLEMENTATIONS, "cpu", cuda_scan)
        patch.setitem(import_module("mambatrain.ops.native.causal_conv").IMPLEMENTATIONS, "cpu", cuda_conv)
        patch.setattr(launching, "launch", launch)
        patch.setattr(launching, "count_processors", lambda device: processors)
        yield


def _compile(program: Program) -> Path:
    """The library of a program: beside the others of this process, by the text it is made from."""
    sources = programs.read_sources() | {"intrinsics.cuh": SHIM.read_text(encoding="utf-8")}
    entries = re.findall(r"^KERNEL\(\d+\) (\w+)\(ARGUMENTS (\w+) args\)", sources[program.source], flags=re.MULTILINE)
    wrappers = "".join(
        f"""
extern "C" void run_{entry}(const void* args, long long blocks, long long shared_bytes, bool reversed) {{
    fibers::run([](const void* args) {{ {entry}(*static_cast<const {type_}*>(args)); }}, args, blocks, shared_bytes,
                reversed);
}}"""
        for entry, type_ in entries
    )
    text = f'#include "{program.source}"\n{wrappers}\n'
    defines = [option for option in program.options() if option.startswith("-D")]
    digest = hashlib.sha256("\0".join([text, *defines, *sources.values()]).encode()).hexdigest()[:24]
    library = _folder() / f"{digest}.so"
    if not library.exists():
        folder = Path(tempfile.mkdtemp(dir=_folder()))
        for name, content in sources.items():
            (folder / name).write_text(content, encoding="utf-8")
        (folder / "main.cpp").write_text(text, encoding="utf-8")
        made = folder / "made.so"
        command = [str(COMPILER), *FLAGS, *defines, str(folder / "main.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made.rename(library)
    return library


@functools.cache
def _load(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="mambatrain-cuda-on-cpu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
