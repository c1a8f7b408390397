"""Each operator forward and backward, against the matrix products of the block it stands in and against torch's own.

    python kernels/benchmark.py [--repeats 15] [--rows 4] [--length 1024] [--json FILE]

The candidates take turns, so that what else the machine does hits all of them, and medians are compared: ratios within
one run mean something, milliseconds of two runs do not. Goals, on two cores with AVX-512: scan over the block's
products at most 0.15 at E = 1536 and 0.20 at E = 768, convolution 8 times torch's, at most 2.2 times the time for twice
the length, at most 1.02 with boundaries.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mambatrain.ops.backends import Backend, choose_backend

CPU = torch.device("cpu")
N, TAPS = 16, 4  # Mamba-1
H, P, S = 24, 64, 128  # Mamba-2: heads, channels of a head, states
Candidates = dict[str, Callable[[], object]]
Medians = dict[str, float]


def gemms(tokens: int, shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """Products with weights of these shapes, forward and both of backward."""
    operands = {
        (rows, columns): (torch.randn(tokens, columns, dtype=dtype), torch.randn(rows, columns, dtype=dtype))
        for rows, columns in shapes
    }

    def run() -> None:
        for shape in shapes:
            x, weight = operands[shape]
            y = x @ weight.T
            y @ weight  # the input's gradient
            y.T @ x  # the weight's

    return run


def with_gradients(
    operator: Callable[..., object], arguments: dict[str, Tensor], **fixed: Tensor
) -> Callable[[], object]:
    """Forward, and backward to every argument."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    with torch.no_grad():
        out = operator(**arguments, **fixed)
    grad = torch.randn_like(out[0] if isinstance(out, tuple) else out)

    def run() -> object:
        out = operator(**leaves, **fixed)
        return torch.autograd.grad(out[0] if isinstance(out, tuple) else out, list(leaves.values()), grad)

    return run


def scan_arguments(rows: int, length: int, E: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """As a block makes them: u and z are halves of one projection, B and C parts of another."""
    u, z = torch.randn(rows, length, 2 * E, dtype=dtype).split(E, dim=-1)
    B, C = torch.randn(rows, length, 2 * N, dtype=dtype).split(N, dim=-1)
    A = -torch.arange(1.0, N + 1).expand(E, N).contiguous()
    dt, bias = torch.randn(rows, length, E, dtype=dtype), torch.full((E,), -4.6)
    return {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": torch.ones(E), "z": z, "dt_bias": bias}


def conv_by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As other implementations do it: channels first, padded, cut, and SiLU on its own."""
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=TAPS - 1, groups=x.shape[2])
    return F.silu(y[..., : x.shape[1]].transpose(1, 2))


def ssd_arguments(rows: int, length: int) -> dict[str, Tensor]:
    """As a Mamba-2 block of the 130m shape makes them: all parts of one projection."""
    x, B, C, dt = torch.randn(rows, length, H * P + 2 * S + H).split([H * P, S, S, H], dim=-1)
    along_time = {"x": x.unflatten(-1, (H, P)), "B": B.unflatten(-1, (1, S)), "C": C.unflatten(-1, (1, S)), "dt": dt}
    return along_time | {"A": -torch.linspace(1, 16, H), "D": torch.ones(H), "dt_bias": torch.full((H,), -4.6)}


def ssd_by_transformers(chunk: int) -> Callable[..., object] | None:
    """The chunked scan inside transformers' Mamba-2, where it is installed."""
    try:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    except ImportError:
        return None

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> object:
        return mamba2_chunk_scan(x, dt, A, B, C, chunk_size=chunk, D=D, dt_bias=dt_bias, dt_softplus=True)

    return run


def ssd_candidates(rows: int, length: int, native: Backend, plain: Backend) -> Candidates:
    arguments, E = ssd_arguments(rows, length), H * P
    starts = torch.rand(rows, length) < 1 / 256
    candidates = {
        "block's GEMMs, fp32": gemms(rows * length, [(2 * E + 2 * S + H, E // 2), (E // 2, E)]),
        "ssd native": with_gradients(native.ssd, arguments),
        "ssd native, boundaries": with_gradients(native.ssd, arguments, boundaries=starts),
        "ssd native, forward": lambda: native.ssd(**arguments),
        "ssd torch": with_gradients(plain.ssd, arguments),
    }
    for chunk in (256, 64):
        theirs = ssd_by_transformers(chunk)
        if theirs is not None:
            candidates[f"ssd transformers, chunk {chunk}"] = with_gradients(theirs, arguments)
    return candidates


def block_candidates(rows: int, length: int, E: int, native: Backend, plain: Backend) -> Candidates:
    d_model, rank = E // 2, -(-E // 32)
    projections = [(2 * E, d_model), (rank + 2 * N, E), (E, rank), (d_model, E)]  # in, x, dt, out
    scan, conv = scan_arguments(rows, length, E), {"weight": torch.randn(E, TAPS), "bias": torch.randn(E)}
    conv["x"] = torch.randn(rows, length, 2 * E)[..., :E]
    starts = torch.rand(rows, length) < 1 / 256
    halves = scan_arguments(rows, length, E, torch.bfloat16)
    many, tile = torch.rand(1 << 18), torch.empty(1 << 18)
    wide, target = torch.randn(rows, length, E), torch.empty(rows, length, E)
    return {
        "block's GEMMs, fp32": gemms(rows * length, projections),
        "scan native": with_gradients(native.selective_scan, scan),
        "scan native, boundaries": with_gradients(native.selective_scan, scan, boundaries=starts),
        "scan native, bf16": with_gradients(native.selective_scan, halves),
        "scan native, forward": lambda: native.selective_scan(**scan),
        "scan torch": with_gradients(plain.selective_scan, scan),
        "conv native": with_gradients(native.causal_conv, conv),
        "conv native, boundaries": with_gradients(native.causal_conv, conv, boundaries=starts),
        "conv native, forward": lambda: native.causal_conv(**conv),
        "conv torch": with_gradients(plain.causal_conv, conv),
        "conv1d + silu of torch": with_gradients(conv_by_torch, conv),
        "probe: copy of (B, L, E)": lambda: target.copy_(wide),
        "probe: 2^18 powers of 2": lambda: torch.exp2(many, out=tile),
    }


def length_candidates(E: int, native: Backend) -> Candidates:
    return {
        f"scan native, L = {length}": with_gradients(native.selective_scan, scan_arguments(1, length, E))
        for length in (512, 1024, 2048, 4096, 8192)
    }


def medians_of(candidates: Candidates, repeats: int) -> Medians:
    """Seconds of each; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_megabytes(states: int) -> float:
    """By how much forward and backward of one scan raise the memory of a fresh process."""
    command = [sys.executable, "-P", __file__, "--peak-of-states", str(states)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_own_peak(states: int) -> None:
    backend, E, length = choose_backend("native", CPU), 1536, 4096
    arguments = scan_arguments(1, length, E) | {"A": -torch.rand(E, states)}
    arguments |= {name: torch.randn(1, length, states) for name in ("B", "C")}
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    before = resident_megabytes("VmRSS")
    out, _ = backend.selective_scan(**arguments)
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    print(resident_megabytes("VmHWM") - before)


def resident_megabytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def print_table(title: str, medians: Medians, baseline: str) -> None:
    print(f"\n{title}\n{'':<28}{'ms':>10}{'over ' + baseline:>28}")
    for name, seconds in medians.items():
        print(f"{name:<28}{seconds * 1e3:>10.2f}{seconds / medians[baseline]:>28.3f}")


def print_block(title: str, medians: Medians, exponentials: int) -> None:
    print_table(title, medians, "block's GEMMs, fp32")
    exps_per_second = 2**18 / medians["probe: 2^18 powers of 2"]
    forward = exponentials / medians["scan native, forward"] / exps_per_second
    print(f"scan forward: {forward:.2f} of the exponentials a second that torch.exp2 reaches in cache")
    print(f"scan: {medians['scan torch'] / medians['scan native']:.1f} times the torch backend")
    print(f"scan with boundaries: {medians['scan native, boundaries'] / medians['scan native']:.3f}")
    print(f"conv + SiLU: {medians['conv1d + silu of torch'] / medians['conv native']:.1f} times torch's")
    print(f"conv with boundaries: {medians['conv native, boundaries'] / medians['conv native']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of-states", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of_states:
        print_own_peak(arguments.peak_of_states)
        return
    native, plain = choose_backend("native", CPU), choose_backend("torch", CPU)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {native.reason}")
    results: dict[str, Medians] = {}
    for E in (1536, 768):
        title = f"E = {E}, B = {arguments.rows}, L = {arguments.length}, forward and backward"
        candidates = block_candidates(arguments.rows, arguments.length, E, native, plain)
        results[title] = medians_of(candidates, arguments.repeats)
        print_block(title, results[title], arguments.rows * arguments.length * E * N)
    title = f"Mamba-2, E = {H * P}, B = {arguments.rows}, L = {arguments.length}, forward and backward"
    candidates = ssd_candidates(arguments.rows, arguments.length, native, plain)
    results[title] = medians_of(candidates, arguments.repeats)
    print_table(title, results[title], "block's GEMMs, fp32")
    for name, seconds in results[title].items():
        if "transformers" in name:
            print(f"ssd: {seconds / results[title]['ssd native']:.1f} times {name.removeprefix('ssd ')}")
    title = "twice the length, E = 768, B = 1"
    results[title] = medians_of(length_candidates(768, native), arguments.repeats)
    print_table(title, results[title], "scan native, L = 512")
    peaks = {f"N = {states}": peak_megabytes(states) for states in (16, 64, 256)}
    print("\npeak memory of one scan and its gradients, E = 1536, L = 4096")
    for name, megabytes in peaks.items():
        print(f"{name:<28}{megabytes:>10.0f} MB")
    if arguments.json:
        content = {"seconds": results, "peak_megabytes": peaks, "threads": torch.get_num_threads()}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
