"""Compiles the Triton kernels for GPUs that are not here, and says what each cubin takes.

    python tests/support/triton_cubins.py bfloat16:80 float32:90:24x40 ...    every DTYPE:ARCHITECTURE, by two processes

where 24x40 are channels of a head and states, else those of the 130M models (64 and 128; a step of Mamba-1: 16 states),
prints a JSON list of {dtype, architecture, kernel, registers, stack, local, shared, atomics}; stack and local are bytes
a thread keeps in memory, which is where registers spill to, shared is bytes a block. `tests/parity/test_triton.py`
holds them to limits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mambatrain.ops.triton import arguments, launch, steps

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
Launch = tuple[str, Any, tuple[Any, ...], dict[str, Any]]


def collect_launches(
    dtype: torch.dtype, rows: int = 4, length: int = 2048, heads: int = 24, channels: int = 64, states: int = 128
) -> list[Launch]:
    """What forward and backward would launch at the shape of the 130M model, on meta tensors: views of projections."""
    launches: dict[str, Launch] = {}

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        variant = "".join(f" {name}" for name in ("BACKWARD", "OF_C") if constants.get(name))
        name = kernel.__name__ + variant
        launches[name] = (name, kernel, args, constants)

    conv = torch.empty(rows, length, heads * channels + 2 * states, dtype=dtype, device="meta")
    x, B, C = conv.split([heads * channels, states, states], dim=-1)
    x, B, C = x.unflatten(-1, (heads, channels)), B.unflatten(-1, (1, states)), C.unflatten(-1, (1, states))
    projection = 2 * heads * channels + 2 * states + heads
    dt = torch.empty(rows, length, projection, dtype=dtype, device="meta")[..., -heads:]
    head = torch.empty(heads, device="meta")
    state = torch.empty(rows, heads, channels, states, device="meta")
    boundaries = torch.empty(rows, length, dtype=torch.bool, device="meta")
    inputs = arguments.Inputs.of(x, dt, head, B, C, head, head, boundaries, state)
    launch.launch = arguments.launch = record
    y = torch.empty(x.shape, dtype=dtype, device="meta")
    launch.run_forward(inputs, y, state)
    gradients = [torch.empty(tensor.shape, dtype=dtype, device="meta") for tensor in (x, dt, B, C)]
    dx, ddt, dB, dC = gradients
    parameters = [torch.empty_like(head) for _ in range(3)]
    launch.run_backward(inputs, y, state, [dx, ddt, parameters[0], dB, dC, *parameters[1:], state])
    collect_steps(x, dt, B, C, head, state, 16 if states == 128 else states)
    return list(launches.values())


def collect_steps(
    x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor, head: torch.Tensor, state: torch.Tensor, N: int
) -> None:
    """Launches what one position would, behind arguments of the scan; Mamba-1's has N states."""
    boundaries = torch.empty(x.shape[0], 1, dtype=torch.bool, device="meta")
    x, dt, B, C = (tensor[:, :1] for tensor in (x, dt, B, C))
    steps.step_ssd(x, dt, head, B, C, head, head, boundaries, state, torch.empty_like(x), state)
    u = x.flatten(-2)
    (rows, _, channels), dtype = u.shape, x.dtype
    weight, window = torch.empty(channels, 4, device="meta"), torch.empty(rows, 3, channels, device="meta")
    steps.step_conv(u, weight, weight[:, 0], boundaries, window, torch.empty_like(u), window)
    A, b = torch.empty(channels, N, device="meta"), torch.empty(rows, 1, 2 * N, dtype=dtype, device="meta")
    h, D = torch.empty(rows, channels, N, device="meta"), A[:, 0]
    steps.step_selective_scan(u, u, A, b[..., :N], b[..., N:], D, u, D, boundaries, h, torch.empty_like(u), h)


def describe(value: Any, place: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """The type of an argument as Triton specialises it at a launch: 1 and None are constants; does 16 divide it?"""
    if isinstance(value, tuple):
        parts = [describe(part, (*place, index), constants, attributes) for index, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if value is None or (isinstance(value, int) and value == 1):
        constants[place] = value
        return "constexpr"
    if isinstance(value, torch.Tensor) or value % 16 == 0:
        attributes[place] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "i32" if value < 2**31 else "i64"


def compile_kernel(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], architecture: int) -> Any:
    """As `arguments.launch` would have it compiled on such a device."""
    options = arguments.compilation(
        architecture, **{name: value for name, value in constants.items() if name in arguments.OPTIONS}
    )
    fixed: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    signature = {
        name: describe(value, (index,), fixed, attributes)
        for index, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False))
    }
    for name, value in constants.items():
        if name not in arguments.OPTIONS:
            signature[name] = "constexpr"
            fixed[(kernel.arg_names.index(name),)] = value
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def measure(dtype_name: str, architecture: int, channels: int = 64, states: int = 128) -> list[dict[str, Any]]:
    def of_all() -> Iterator[dict[str, Any]]:
        launches = collect_launches(getattr(torch, dtype_name), channels=channels, states=states)
        for name, kernel, args, constants in launches:
            compiled = compile_kernel(kernel, args, constants, architecture)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                Path(file.name).write_bytes(compiled.asm["cubin"])
                usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
            registers, stack, local = (
                int(number)
                for number in re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout).groups()
            )
            yield {
                "dtype": dtype_name,
                "architecture": architecture,
                "kernel": name,
                "registers": registers,
                "stack": stack,
                "local": local,
                "shared": compiled.metadata.shared,
                "atomics": len(re.findall(r"\b(?:atom|red)\.", compiled.asm["ptx"])),
            }

    return list(of_all())


if __name__ == "__main__":
    asked = [triple.split(":") for triple in sys.argv[1:]]
    with ProcessPoolExecutor(2) as pool:
        pending = [
            pool.submit(
                measure, dtype_name, int(architecture), *(int(size) for one in sizes for size in one.split("x"))
            )
            for dtype_name, architecture, *sizes in asked
        ]
        print(json.dumps([line for future in pending for line in future.result()]))
