"""Kernels on a GPU: loaded once for each device, launched on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import torch

from mambatrain.errors import UserError
from mambatrain.ops.native.cuda import programs
from mambatrain.ops.native.cuda.programs import OLDEST_ARCHITECTURE, THREADS, Program, cached_path, load_code

_loading = threading.Lock()


def launch(program: Program, entry: str, num_blocks: int, arguments: ctypes.Structure, device: torch.device) -> None:
    """Starts `num_blocks` blocks of an entry of a program; the arguments are copied before this returns.

    Raises:
        UserError: the code cannot be compiled, loaded or started; with the name that CUDA has for it.
    """
    if num_blocks == 0:
        return
    from cuda.bindings import driver

    index = _index_of(device)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    stream = torch.cuda.current_stream(index).cuda_stream
    # A thread of autograd's may not have met the device yet: then no context is current in it.
    _check(driver.cuCtxPushCurrent(_primary_context(index)), f"{device} cannot be used")
    try:
        with _loading:
            function = _load(program, entry, index)
        _check(
            driver.cuLaunchKernel(
                function,
                *(num_blocks, 1, 1),
                *(THREADS, 1, 1),
                *(program.shared_bytes, stream, ctypes.addressof(pointers), 0),
            ),
            f"{entry} cannot be started on {device}",
        )
    finally:
        driver.cuCtxPopCurrent()


def why_unavailable(device: torch.device) -> str | None:
    """Why kernels cannot run on a GPU, as a clause; None where they can."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    architecture = architecture_of(_index_of(device))
    if architecture < OLDEST_ARCHITECTURE:
        name, oldest = torch.cuda.get_device_name(device), OLDEST_ARCHITECTURE / 10
        return f"{name} has compute capability {architecture / 10}, and they need {oldest}"
    return programs.why_unavailable()


def describe_device(device: torch.device) -> str:
    """For people: `sm_90 by NVRTC 13.5`."""
    return f"sm_{architecture_of(_index_of(device))} by NVRTC {programs.describe_compiler()}"


@functools.cache
def count_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def architecture_of(index: int) -> int:
    """90 for compute capability 9.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _primary_context(index: int) -> Any:
    """The context in which torch's memory and streams are, too."""
    from cuda.bindings import driver

    torch.cuda.init()  # type: ignore[no-untyped-call]
    device = _check(driver.cuDeviceGet(index), f"cuda:{index} cannot be found")
    return _check(driver.cuDevicePrimaryCtxRetain(device), f"cuda:{index} cannot be used")


@functools.cache
def _load(program: Program, entry: str, index: int) -> Any:
    from cuda.bindings import driver

    module = _load_module(program, index)
    function = _check(driver.cuModuleGetFunction(module, entry.encode()), f"{program.source} has no {entry}")
    size = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(
        driver.cuFuncSetAttribute(function, size, program.shared_bytes),
        f"{entry} needs {program.shared_bytes} bytes of shared memory, and {torch.cuda.get_device_name(index)} refuses",
    )
    return function


@functools.cache
def _load_module(program: Program, index: int) -> Any:
    from cuda.bindings import driver

    architecture = architecture_of(index)
    answer = driver.cuModuleLoadData(load_code(program, architecture))
    if int(answer[0]) != 0:  # a file that was damaged on the disk is made again, once
        cached_path(program, architecture).unlink(missing_ok=True)
        answer = driver.cuModuleLoadData(load_code(program, architecture))
    return _check(answer, f"{program.source} for sm_{architecture} cannot be loaded")


def _index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _check(answer: tuple[Any, ...], what: str) -> Any:
    """What a function of the driver has returned, behind its result code."""
    from cuda.bindings import driver

    result, *values = answer
    if int(result) != 0:
        name, text = driver.cuGetErrorName(result)[1], driver.cuGetErrorString(result)[1]
        raise UserError(
            f"CUDA: {what}: {(name or b'unknown').decode()} ({(text or b'no text').decode()})",
            "--kernels torch runs without these kernels; `mambatrain kernels check` names what is wrong with them",
        )
    return values[0] if values else None
