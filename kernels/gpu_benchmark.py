"""Operators, training steps and decoding on a GPU, against mamba-ssm where it is installed and the block's products.

    python kernels/gpu_benchmark.py [--repeats 20] [--json FILE]         needs torch alone; `make gpu` runs it

bf16 (decoding: fp32), at the paper's shapes, B = 8, L = 2048; medians of candidates that take turns, by CUDA events.
Nobody has run it on a GPU yet. `--device cpu --tiny` goes through the same lines without one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from benchmark import gemms, with_gradients  # beside this script
from torch import Tensor
from torch.nn import functional as F

from mambatrain.devices import measure_peak_flops
from mambatrain.errors import UserError
from mambatrain.generation.token_step import TokenStep, record
from mambatrain.models.flops import training_flops_per_token
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import Backend, choose_backend
from mambatrain.training.objective import NextTokenLoss

BACKENDS = ("native", "mamba-ssm", "torch")
Candidates = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Shape:
    """What a model reads of a recipe's model section, which needs pydantic; the same names and defaults."""

    block: Literal["mamba1", "mamba2"]
    d_model: int
    num_layers: int
    vocab_size: int = 50_277
    d_conv: int = 4
    head_dim: int = 64
    num_groups: int = 1
    conv_bias: bool = True
    proj_bias: bool = False
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4

    @property
    def d_inner(self) -> int:
        return 2 * self.d_model

    @property
    def state_size(self) -> int:
        return 16 if self.block == "mamba1" else 128

    @property
    def dt_rank_size(self) -> int:
        return math.ceil(self.d_model / 16)

    @property
    def num_heads(self) -> int:
        return self.d_inner // self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / 8) * 8


PAPER = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
STEPS = {"130m": 16, "1.4b": 4}  # rows of a step
DECODED = ("130m", "1.4b", "2.8b")


class Stopwatch:
    """Seconds of a call, on the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def take_turns(candidates: Candidates, repeats: int, stopwatch: Stopwatch) -> dict[str, float]:
    """Median seconds; three rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 3):
        for name, run in candidates.items():
            taken = stopwatch(run)
            if repeat >= 3:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def backends(device: torch.device, dtype: torch.dtype) -> Iterator[Backend]:
    """Those that run here; what is missing is said, and no failure."""
    for name in BACKENDS:
        try:
            yield choose_backend(name, device, dtype)
        except UserError as error:
            print(f"left out: {error.message}")


def scan_arguments(block: str, rows: int, length: int, d_model: int, device: torch.device) -> dict[str, Tensor]:
    """bf16 slices of projections, as a block makes them; parameters in fp32."""
    E = 2 * d_model

    def series(*sizes: int) -> tuple[Tensor, ...]:
        return torch.randn(rows, length, sum(sizes), device=device, dtype=torch.bfloat16).split(sizes, dim=-1)

    if block == "mamba2":
        heads = E // 64
        x, B, C, dt = series(E, 128, 128, heads)
        along_time = {"x": x.unflatten(-1, (heads, 64)), "dt": dt, "B": B[:, :, None], "C": C[:, :, None]}
        A = -torch.linspace(1, 16, heads, device=device)
        return along_time | {"A": A, "D": torch.ones(heads, device=device), "dt_bias": A.new_full((heads,), -4.6)}
    (u, z), (B, C), (dt,) = series(E, E), series(16, 16), series(E)
    A = -torch.arange(1, 17, device=device).float().repeat(E, 1)
    fixed = {"A": A, "D": torch.ones(E, device=device), "dt_bias": A.new_full((E,), -4.6)}
    return {"u": u, "dt": dt, "B": B, "C": C, "z": z} | fixed


def projections(block: str, d_model: int) -> list[tuple[int, int]]:
    E = 2 * d_model
    if block == "mamba2":
        return [(2 * E + 2 * 128 + E // 64, d_model), (d_model, E)]
    rank = math.ceil(d_model / 16)
    return [(2 * E, d_model), (rank + 32, E), (E, rank), (d_model, E)]


def operator_candidates(block: str, rows: int, length: int, d_model: int, device: torch.device) -> Candidates:
    arguments = scan_arguments(block, rows, length, d_model, device)
    name = "selective_scan" if block == "mamba1" else "ssd"
    found: Candidates = {}
    with torch.device(device):
        found["block's matrix products"] = gemms(rows * length, projections(block, d_model), torch.bfloat16)
        starts = torch.rand(rows, length) < 1 / 512
        conv = {"x": torch.randn(rows, length, 4 * d_model).bfloat16()[..., : 2 * d_model]}
        conv |= {"weight": torch.randn(2 * d_model, 4), "bias": torch.randn(2 * d_model)}
    for backend in backends(device, torch.bfloat16):
        if backend.name == "torch" and block == "mamba1" and device.type == "cuda":
            continue  # many small kernels: minutes at these shapes
        operator = getattr(backend, name)
        found[f"{name}, {backend.name}, forward"] = lambda operator=operator: operator(**arguments)
        found[f"{name}, {backend.name}"] = with_gradients(operator, arguments)
        if backend.name == "native":
            found[f"{name}, native, boundaries"] = with_gradients(operator, arguments, boundaries=starts)
        found[f"conv + SiLU, {backend.name}"] = with_gradients(backend.causal_conv, conv)
    return found


def step_row(shape: Shape, rows: int, length: int, backend: Backend, device: torch.device, repeats: int) -> str:
    """One training step: forward, backward, clipping, AdamW; parameters in fp32, products in bf16."""
    with device:
        model: Any = LanguageModel(shape, backend)  # type: ignore[arg-type]
    initialise(model, shape, 0)  # type: ignore[arg-type]
    objective = NextTokenLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, shape.vocab_size, (rows, length + 1), device=device)
    boundaries = torch.zeros(rows, length, dtype=torch.bool, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective(tokens[:, :-1], boundaries, tokens[:, 1:].contiguous())
        (loss / (rows * length)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = take_turns({"step": step}, repeats, Stopwatch(device))["step"]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else math.nan
    flops = rows * length * training_flops_per_token(shape, length)  # type: ignore[arg-type]
    utilisation = flops / seconds / measure_peak_flops(device, "bf16")[0]
    tokens_per_second = rows * length / seconds
    return f"{seconds * 1e3:>12.1f}{tokens_per_second:>12,.0f}{utilisation:>8.1%}{peak:>10.1f}"


def decoding_candidates(shape: Shape, backend: Backend, device: torch.device) -> Candidates:
    """One token of one row, logits included, in fp32: started kernel by kernel, and by a CUDA graph as `generate` does.

    Against them the step's matrix products alone, by a graph, too: every weight is read once, as it has to be.
    """
    with device:
        model: Any = LanguageModel(shape, backend)  # type: ignore[arg-type]
    initialise(model, shape, 0)  # type: ignore[arg-type]
    model.requires_grad_(False)
    token = torch.full((1, 1), 5, device=device)
    state = [model.hidden_states(token.repeat(1, 4))[1]]
    head = model.head_weight

    def by_kernels() -> None:
        hidden, state[0] = model.hidden_states(token, token == 0, state[0])
        F.linear(hidden, head)

    found: Candidates = {}
    if device.type == "cuda":
        linears = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
        matrices = [(weight, head.new_zeros(1, weight.shape[1])) for weight in (*linears, head)]

        def multiply() -> None:
            for weight, x in matrices:
                F.linear(x, weight)

        products = record(multiply, device)
        found["matrix products"] = lambda: (products(), matrices)  # held, because the graph reads them
        step, held = TokenStep(model, 0), list(state)

        def by_graph() -> None:
            hidden, held[0] = step.read(5, held[0])
            F.linear(hidden, head)

        found[f"{backend.name}, CUDA graph"] = by_graph
    return found | {f"{backend.name}, kernel by kernel": by_kernels}


def print_decoding(sizes: dict[str, tuple[int, int]], device: torch.device, repeats: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    print(f"\none token of decoding, B = 1, fp32\n{'':<40}{'ms':>10}{'tokens/s':>12}")
    for block in ("mamba1", "mamba2"):
        for size, dimensions in sizes.items():
            for backend in backends(device, torch.float32):
                if backend.name == "native":
                    candidates = decoding_candidates(Shape(block, *dimensions), backend, device)
                    medians = take_turns(candidates, repeats, Stopwatch(device))
                    results[f"decoding, {block}, {size}"] = medians
                    for name, seconds in medians.items():
                        print(
                            f"{f'{block}, {size}, {name}':<40}{seconds * 1e3:>10.3f}{1 / seconds:>12,.0f}", flush=True
                        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="small shapes: a trial of this script")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows, length = (2, 64) if arguments.tiny else (8, 2048)
    paper = {"tiny": (64, 2)} if arguments.tiny else PAPER
    steps = {"tiny": 2} if arguments.tiny else STEPS
    decoded = ("tiny",) if arguments.tiny else DECODED
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{what}, torch {torch.__version__}, bf16, B = {rows}, L = {length}")
    results: dict[str, Any] = {"device": what, "torch": torch.__version__}
    for block in ("mamba1", "mamba2"):
        for size, (d_model, _) in paper.items():
            candidates = operator_candidates(block, rows, length, d_model, device)
            medians = take_turns(candidates, arguments.repeats, Stopwatch(device))
            results[f"{block}, {size}"] = medians
            products = medians["block's matrix products"]
            print(f"\n{block}, {size}: E = {2 * d_model}, forward and backward where nothing else is said")
            print(f"{'':<40}{'ms':>10}{'ns/token':>12}{'ratio':>8}")
            for name, seconds in medians.items():
                nanoseconds = seconds / (rows * length) * 1e9
                print(f"{name:<40}{seconds * 1e3:>10.3f}{nanoseconds:>12.2f}{seconds / products:>8.3f}")
    print(f"\ntraining steps\n{'':<28}{'ms':>12}{'tokens/s':>12}{'MFU':>8}{'peak GiB':>10}")
    for block in ("mamba1", "mamba2"):
        for size, step_rows in steps.items():
            shape = Shape(block, *paper[size])
            for backend in backends(device, torch.float32):
                if backend.name != "native" and not arguments.tiny:
                    continue
                row = step_row(shape, step_rows, length, backend, device, max(arguments.repeats // 4, 1))
                results[f"step, {block}, {size}, {backend.name}"] = row.split()
                print(f"{f'{block}, {size}, {backend.name}':<28}{row}", flush=True)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    results |= print_decoding({size: paper[size] for size in decoded}, device, arguments.repeats)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
