"""Peak memory of a whole training step against row length and number of states.

    python kernels/step_memory.py [--recipe demo] [--rows 4] [--kernels native]

Each figure is a fresh process: what a step of forward, backward, clipping and AdamW adds at its worst to weights,
optimizer state and everything imported. The tensors that a step keeps are of (L, E); one of (L, E, N) would show as a
column that grows with N as N does.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from benchmark import resident_megabytes  # beside this script
from step_benchmark import our_step

from mambatrain.recipe import Recipe, read_recipe


def peak_of_a_step(recipe: Recipe, kernels: str, rows: int, length: int) -> float:
    """Megabytes that a step adds, in this process; a step of a few tokens before it makes the optimizer's state."""
    tokens = torch.randint(0, recipe.model.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    step = our_step(recipe, kernels, False)
    step(tokens[:, :9])
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    before = resident_megabytes("VmRSS")
    step(tokens)
    return resident_megabytes("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--kernels", default="native")
    parser.add_argument("--lengths", default="512,1024,2048", help="tokens of a row")
    parser.add_argument("--states", default="16,64,256")
    arguments = parser.parse_args()
    all_states = [int(states) for states in arguments.states.split(",")]
    shape = read_recipe(arguments.recipe).model
    print(
        f"{arguments.recipe}, {arguments.kernels}, fp32, {arguments.rows} rows: megabytes that a step adds at its worst"
    )
    print(f"{'row tokens':<12}" + "".join(f"{f'N = {states}':>12}" for states in all_states) + f"{'(L, E, N)':>14}")
    for length in (int(length) for length in arguments.lengths.split(",")):
        peaks = []
        for states in all_states:
            recipe = read_recipe(arguments.recipe, [f"model.d_state={states}"])
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                peaks.append(process.submit(peak_of_a_step, recipe, arguments.kernels, arguments.rows, length).result())
        one_whole = arguments.rows * length * shape.expand * shape.d_model * all_states[-1] * 4 / 2**20
        print(f"{length:<12}" + "".join(f"{peak:>12,.0f}" for peak in peaks) + f"{one_whole:>14,.0f}", flush=True)
    print(f"(L, E, N): one such fp32 tensor, of one layer, with N = {all_states[-1]}")


if __name__ == "__main__":
    main()
