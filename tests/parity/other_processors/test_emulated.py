"""kernels/cpu compiled for aarch64 (NEON) and run under emulation, against the libraries of this machine.

Skipped where the cross compiler or the emulator is missing; Debian has both: g++-aarch64-linux-gnu, qemu-user-static.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mambatrain.ops import native

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "kernels" / "cpu"

pytestmark = [
    pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"no {COMPILER} or {EMULATOR}"),
    pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable())),
]

# Number, sizes, then arguments in the driver's order: a name and its dimensions; T marks what has the dtype under test.
Shapes = dict[str, tuple[int, ...]]
OPERATORS: dict[str, tuple[int, Callable[..., tuple[Tensor, Tensor]], tuple[int, ...], Shapes, Shapes, list[str]]] = {}


def define(
    name: str,
    scan: Callable[..., tuple[Tensor, Tensor]],
    sizes: tuple[int, ...],
    series: Shapes,
    fixed: Shapes,
    order: list[str],
) -> None:
    OPERATORS[name] = (len(OPERATORS), scan, sizes, series, fixed, order)


R, L, E, N = 2, 70, 21, 9
define(
    "selective_scan",
    native.selective_scan,
    (R, L, E, N),
    {"u": (R, L, E), "dt": (R, L, E), "z": (R, L, E), "B": (R, L, N), "C": (R, L, N)},
    {"A": (E, N), "D": (E,), "dt_bias": (E,), "initial_state": (R, E, N)},
    ["u", "dt", "z", "B", "C", "A", "D", "dt_bias", "initial_state"],
)
LONG, H, G, P, S = 140, 4, 2, 6, 18
define(
    "ssd",
    native.ssd,
    (R, LONG, H, G, P, S),
    {"x": (R, LONG, H, P), "B": (R, LONG, G, S), "C": (R, LONG, G, S), "dt": (R, LONG, H)},
    {"A": (H,), "D": (H,), "dt_bias": (H,), "initial_state": (R, H, P, S)},
    ["x", "dt", "B", "C", "A", "D", "dt_bias", "initial_state"],
)
TAPS = 4
define(
    "causal_conv",
    native.causal_conv,
    (R, L, E, TAPS),
    {"x": (R, L, E)},
    {"weight": (E, TAPS), "bias": (E,), "initial_window": (R, TAPS - 1, E)},
    ["x", "weight", "bias", "initial_window"],
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("aarch64") / "driver"
    sources = sorted(SOURCES.glob("*.cpp"))
    flags = ["-std=c++17", "-O2", "-static", "-ffp-contract=fast", "-Wno-psabi", f"-I{SOURCES}"]
    subprocess.run([COMPILER, *flags, str(HERE / "driver.cpp"), *map(str, sources), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_same_numbers_on_aarch64(name: str, dtype: torch.dtype, driver: Path) -> None:
    number, scan, sizes, series, fixed, order = OPERATORS[name]
    generator = torch.Generator().manual_seed(number)
    arguments = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in series.items()}
    arguments |= {key: torch.randn(shape, generator=generator) for key, shape in fixed.items()}
    if "A" in arguments:
        arguments["A"] = -arguments["A"].exp()
    boundaries = torch.rand(sizes[:2], generator=generator) < 0.05
    leaves = {key: tensor.requires_grad_() for key, tensor in arguments.items()}
    outputs = scan(**leaves, boundaries=boundaries)
    weights = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    wanted = [*outputs, *torch.autograd.grad(outputs, [leaves[key] for key in order], weights)]

    header = struct.pack("8q", number, int(dtype == torch.bfloat16), *sizes, *[0] * (6 - len(sizes)))
    inputs = [*arguments.values(), boundaries, *weights]
    command = [EMULATOR, "-cpu", "cortex-a72", str(driver)]
    answer = subprocess.run(command, input=header + b"".join(map(as_bytes, inputs)), check=True, capture_output=True)
    offset = 0
    for what, tensor in zip(["out", "state", *order], wanted, strict=True):
        num_bytes = tensor.numel() * tensor.element_size()
        found = torch.frombuffer(bytearray(answer.stdout[offset : offset + num_bytes]), dtype=tensor.dtype)
        offset += num_bytes
        apart = (found.double() - tensor.detach().double().flatten()).abs().max() / tensor.detach().double().abs().max()
        # the processors sum in another order; a sum may then round to the bf16 beside it
        assert apart <= (1e-5 if tensor.dtype == torch.float32 else 2**-7), what
    assert offset == len(answer.stdout)


def as_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().flatten()
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy().tobytes()
