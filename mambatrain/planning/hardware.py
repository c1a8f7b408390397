"""Devices that a plan may be made for: memory, and the speed that utilisation is measured against."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mambatrain.devices import Precision
from mambatrain.ops.backends import Backend

MIB = 2**20


@dataclass(frozen=True)
class Device:
    """One kind of device."""

    name: str
    memory_bytes: int
    """What nvidia-smi calls total; of the CPU, what is free now."""
    bf16_flops: float
    """FLOP/s of dense matrix products with bf16 inputs and fp32 sums, by the maker's data sheet."""
    fp32_flops: float
    """The same in plain fp32: torch does not use TF32 unless it is told to."""
    fp64_flops: float

    def peak_flops(self, precision: Precision) -> float:
        return {"bf16": self.bf16_flops, "fp32": self.fp32_flops, "fp64": self.fp64_flops}[precision]


GPUS = {
    "h200": Device("NVIDIA H200", 143_771 * MIB, 989e12, 67e12, 67e12),
    "h100": Device("NVIDIA H100 80GB (SXM)", 81_559 * MIB, 989e12, 67e12, 67e12),
    "a100-80": Device("NVIDIA A100 80GB", 81_920 * MIB, 312e12, 19.5e12, 19.5e12),
    "l40s": Device("NVIDIA L40S", 46_068 * MIB, 362e12, 91.6e12, 1.43e12),
    "4090": Device("NVIDIA RTX 4090", 24_564 * MIB, 165e12, 82.6e12, 1.29e12),
}

# Of a GPU's memory: context, libraries and the allocator's fragments take the rest. A rule, not measured here.
USABLE_OF_GPU = 0.9


def native_on_gpus() -> Backend:
    """The native kernels for CUDA, to be traced without running; they need be nowhere near."""
    from mambatrain.ops import native
    from mambatrain.ops.triton import ssd

    return Backend("native", "CUDA C++ and Triton", native.selective_scan, ssd.ssd, native.causal_conv)


def this_gpu() -> Device | None:
    """The first CUDA device of this machine, where it is one of the table."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0)
    marks = {"H200": "h200", "H100": "h100", "A100": "a100-80", "L40S": "l40s", "4090": "4090"}
    key = next((key for mark, key in marks.items() if mark in name), None)
    return None if key is None else replace(GPUS[key], name=name, memory_bytes=torch.cuda.mem_get_info(0)[1])


def this_cpu(precision: Precision) -> Device:
    """This machine's CPU: the memory that is free now, and the speed of a matrix product measured now."""
    import torch

    from mambatrain.devices import available_memory_bytes, measure_peak_flops

    cpu = torch.device("cpu")
    flops, _ = measure_peak_flops(cpu, precision)
    return Device(f"this CPU, {torch.get_num_threads()} threads", available_memory_bytes(cpu), flops, flops, flops)
