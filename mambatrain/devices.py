"""Processes, devices and precision: the only file that imports accelerate."""

from __future__ import annotations

import ctypes
import functools
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from mambatrain.errors import UserError
from mambatrain.launch import RANK_TIMEOUT_SECONDS, num_processes_expected, rank_of_process

if TYPE_CHECKING:
    from accelerate import Accelerator

DeviceName = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp64"]
T = TypeVar("T")

# Dense bf16 (fp16 on older parts) peak without sparsity, in FLOP/s, from the makers' data sheets.
_GPU_PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

# What `accelerate launch` hands over from its configuration file and the recipe already says.
_REFUSED_ENTRIES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
# The same, for entries that have a value: what may stay, and what the recipe calls it.
_REFUSED_VALUES = {
    "ACCELERATE_MIXED_PRECISION": ({"no"}, "training.precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ({"1"}, "training.micro_batch_rows"),
    "ACCELERATE_DYNAMO_BACKEND": ({"no"}, "nothing: models are not compiled"),
}


def choose_device(asked: DeviceName) -> torch.device:
    """The device this machine trains on.

    Raises:
        UserError: cuda was asked for and there is none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA device on this machine", "use --device cpu, or check `nvidia-smi` and your torch build"
        )
    use_cuda = asked == "cuda" or (asked == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def keep_freed_memory() -> None:
    """Lets the C library keep what tensors free, where it is glibc; for processes that compute on a CPU.

    By default each large tensor is mapped anew and its pages are faulted in one by one: up to a third of a training
    step (docs/benchmarks.md). What is kept is used again; the peak stays what it was.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)  # no allocation is a mapping of its own
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # nor is the end of the heap handed back


def refuse_missing_gpus(asked: int) -> None:
    """
    Raises:
        UserError: this machine has fewer CUDA devices.
    """
    present = torch.cuda.device_count()
    if present < asked:
        raise UserError(
            f"{asked} GPUs were asked for and this machine has {present}",
            "lower --gpus, check `nvidia-smi`, or use --processes N on the CPU",
        )


def resolve_precision(asked: Literal["auto", "fp32", "bf16", "fp64"], device: torch.device) -> Precision:
    """`auto` is bf16 where the machine multiplies it in hardware, else fp32."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if in_hardware else "fp32"


def start_accelerator(
    device: torch.device, precision: Precision, join_seconds: float = RANK_TIMEOUT_SECONDS
) -> Accelerator:
    """Joins the processes of this run; autocast is bf16 for `bf16` and off otherwise.

    Args:
        device, precision: what it computes on, and in.
        join_seconds: how long a process waits here for the others.

    Raises:
        UserError: an accelerate configuration asks for something that belongs to the recipe, or a process did not come.
    """
    for variable, what in _REFUSED_ENTRIES.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"the accelerate configuration asks for {what}; only its processes and rendezvous are honoured",
                f"remove {what} from the file that `accelerate config` wrote, or launch with torchrun",
            )
    for variable, (neutral, setting) in _REFUSED_VALUES.items():
        if (value := os.environ.get(variable, "").lower()) and value not in neutral:
            raise UserError(
                f"the accelerate configuration sets {variable}={value}; only its processes and rendezvous are honoured",
                f"unset {variable}; the recipe says it with {setting}",
            )
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    with explaining_absent_ranks(join_seconds), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(OMP_NUM_THREADS|pin_memory).*")
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="bf16" if precision == "bf16" else "no",
            gradient_accumulation_steps=1,  # the loop accumulates and divides by counted targets itself
            # DDP would regroup its buckets after the first backward pass, so that a resumed process summed gradients
            # over ranks in another order than one that never stopped. Looking for unused parameters keeps the buckets.
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=join_seconds)),
            ],
        )
    expected = num_processes_expected()
    if accelerator.num_processes != expected:
        raise UserError(
            f"{expected} processes were started but accelerate joined {accelerator.num_processes}",
            "start with `mambatrain ... --processes N`, or with torchrun",
        )
    return accelerator


@contextmanager
def explaining_absent_ranks(seconds: float) -> Iterator[None]:
    """
    Raises:
        UserError: the block waited in vain for the other processes of the run.
    """
    started = time.monotonic()
    try:
        yield
    except RuntimeError as error:  # of which torch's errors of stores and connections are
        if num_processes_expected() == 1 or time.monotonic() - started < seconds:
            raise
        raise UserError(
            f"process {rank_of_process()} of {num_processes_expected()} waited {seconds:g} seconds for the others to "
            f"come: {str(error).splitlines()[0]}",
            "look at what the others say; where they take that long by right, give a larger --rank-timeout",
        ) from None


def from_main_process(value: T) -> T:
    """What rank 0 has, on every rank."""
    if num_processes_expected() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    broadcast: list[T] = broadcast_object_list([value])
    return broadcast[0]


def from_all_processes(value: T) -> list[T]:
    """What each rank has, in their order, on every rank."""
    if num_processes_expected() == 1:
        return [value]
    from accelerate.utils import gather_object

    gathered: list[T] = gather_object([value])
    return gathered


def end_processes() -> None:
    """Leaves the process group, so that a finished run ends without torch's warning."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@functools.cache
def measure_peak_flops(device: torch.device, precision: Precision) -> tuple[float, str]:
    """FLOP/s that model FLOPs utilisation is measured against, and where the figure comes from.

    GPUs: the data sheet's dense bf16 figure. Others: the fastest of a few square matrix products here.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in _GPU_PEAK_FLOPS.items():
            if part in name:
                return peak, f"data sheet of {part}, bf16"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[precision]
    size, best = 1024, float("inf")
    left, right = torch.ones(size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    for _ in range(6):
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, f"measured: {precision} product of {size} x {size}"


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory of this process so far: the allocator's on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory_bytes(device: torch.device) -> int:
    """Memory that a run may plan with."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
