"""Cross-entropy over a large vocabulary: chunked, as training takes it, against logits that are held whole.

    python kernels/cross_entropy_benchmark.py [--positions 4096] [--vocabulary 50280] [--d-model 768] [--repeats 5]

Forward and backward to hidden states and weight. Times are medians of candidates that take turns in one process that
keeps freed memory, as training does; peaks are those of a fresh process each, above what its arguments take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from benchmark import resident_megabytes  # beside this script
from torch import Tensor
from torch.nn import functional as F

from mambatrain.devices import keep_freed_memory
from mambatrain.ops.backends import choose_backend
from mambatrain.ops.cross_entropy import chunked_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def chunked(kernels: str) -> Loss:
    softmax_loss = choose_backend(kernels, torch.device("cpu")).softmax_loss
    return lambda hidden, weight, targets: chunked_cross_entropy(hidden, weight, targets, softmax_loss)


def find_loss(name: str) -> Loss:
    return full_logits if name == "full logits" else chunked(name)


def make_arguments(positions: int, vocabulary: int, d_model: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(positions, d_model, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, d_model)).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (positions,))


def run(loss: Loss, arguments: tuple[Tensor, Tensor, Tensor], bf16: bool) -> float:
    """Seconds of forward and backward."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        value = loss(*arguments)
    torch.autograd.grad(value, arguments[:2])
    return time.perf_counter() - start


def peak_megabytes(name: str, sizes: tuple[int, int, int], bf16: bool) -> float:
    loss, arguments = find_loss(name), make_arguments(*sizes)
    run(loss, make_arguments(8, 8, 8), bf16)  # what torch allocates once
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    before = resident_megabytes("VmRSS")
    run(loss, arguments, bf16)
    return resident_megabytes("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=50_280)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    sizes, names = (options.positions, options.vocabulary, options.d_model), ("full logits", "torch", "native")
    print(f"{sizes[0]} positions, V = {sizes[1]}, d_model = {sizes[2]}, {torch.get_num_threads()} threads")
    print(f"{'':<22}{'ms':>10}{'times':>8}{'peak MB':>10}{'times':>8}")
    keep_freed_memory()
    arguments = make_arguments(*sizes)
    for bf16 in (False, True):
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(options.repeats + 1):
            for name in names:
                taken = run(find_loss(name), arguments, bf16)
                if repeat:  # the first round warms up
                    seconds[name].append(taken)
        medians, peaks = {name: statistics.median(values) for name, values in seconds.items()}, {}
        for name in names:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                peaks[name] = process.submit(peak_megabytes, name, sizes, bf16).result()
        for name in names:
            ratios = medians[name] / medians[names[0]], peaks[name] / peaks[names[0]]
            label = f"{name}, {'bf16' if bf16 else 'fp32'}"
            print(f"{label:<22}{medians[name] * 1e3:>10.0f}{ratios[0]:>8.2f}{peaks[name]:>10.0f}{ratios[1]:>8.2f}")


if __name__ == "__main__":
    main()
