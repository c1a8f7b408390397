"""How much memory a long document takes to train on: one of up to 1,000,000 tokens, against two rows' worth of it.

    python tests/long/long_document.py [--lengths 64000 256000 1000000] [--blocks mamba1 mamba2] [--width 64]

In segments of 4,000 (`training.segment_tokens`: one row, one step, gradients through all of it) and with the state
carried (`data.carry_state`: rows of 4,000, one a step, detached). Each figure is of a process of its own: its largest
resident size, less what it had when everything was imported and nothing begun. Ends with 1 where more than 5% of it
come on top of that for 8,000 tokens, the states between segments, and 33 bytes a token of a row (ids, targets,
boundaries, and the row as it is read).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from mambatrain.data.token_shards import TokenShardWriter
from mambatrain.recipe import Recipe, parse_recipe, write_recipe

SEGMENT, VOCABULARY, BYTES_A_TOKEN = 4000, 512, 33

# Read in the child: what the system tells the parent counts the parent's own memory, too.
TRAIN = """
import re, sys
from pathlib import Path
import torch, accelerate, matplotlib.pyplot
from mambatrain.recipe import read_recipe
from mambatrain.training.assemble import Where
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

recipe, where = read_recipe(sys.argv[1]), Where("cpu", sys.argv[3], quiet=True)
before = peak()
assert run_training(recipe, Path(sys.argv[2]), where, "fresh", StopRequest()) == 0
print("peak", peak() - before)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64_000, 256_000, 1_000_000])
    parser.add_argument("--blocks", nargs="+", default=["mamba1", "mamba2"])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--kernels", default="auto")
    arguments = parser.parse_args()
    grown = []
    for block in arguments.blocks:
        for how in ("in segments", "carried"):
            short = 0
            for length in (2 * SEGMENT, *arguments.lengths):
                recipe = recipe_of(block, length, how, arguments.width, arguments.layers)
                peak = peak_of(recipe, length, arguments.kernels)
                kept = length // SEGMENT * state_bytes(recipe) if how == "in segments" else state_bytes(recipe)
                kept += BYTES_A_TOKEN * recipe.data.row_tokens
                short = short or peak - kept
                grown.append(peak - kept > 1.05 * short)
                print(
                    f"{block}, {length:,} tokens {how}: {peak / 1e6:.1f} MB, {kept / 1e6:.1f} MB of it states and ids; "
                    f"the rest is {(peak - kept) / short:.2f} of that for {2 * SEGMENT:,}"
                    + (" TOO MUCH" if grown[-1] else ""),
                    flush=True,
                )
    return int(any(grown))


def recipe_of(block: str, length: int, how: str, width: int, layers: int) -> Recipe:
    """A small model and one document."""
    row = SEGMENT if how == "carried" else length
    content = {
        "model": {"block": block, "d_model": width, "num_layers": layers, "vocab_size": VOCABULARY},
        "data": {"shards": "tokens", "row_tokens": row, "carry_state": how == "carried"},
        "training": {
            "rows_per_step": 1,
            "micro_batch_rows": 1,
            "total_steps": length // row,
            "precision": "fp32",
            "segment_tokens": SEGMENT if how == "in segments" else None,
        },
        "optimizer": {"learning_rate": 1e-3},
    }
    return parse_recipe(content, how)


def state_bytes(recipe: Recipe) -> int:
    """Of one state of all layers: fp32, the window of the convolution included."""
    model = recipe.model
    channels = model.d_inner + (2 * model.num_groups * model.state_size if model.block == "mamba2" else 0)
    return 4 * model.num_layers * (model.d_inner * model.state_size + (model.d_conv - 1) * channels)


def peak_of(recipe: Recipe, length: int, kernels: str) -> int:
    """Bytes, of a process that trains on one document of so many tokens."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator = np.random.default_rng(0)
        with TokenShardWriter(folder / "tokens", np.dtype("<u2")) as writer:
            writer.append(np.zeros(1, np.int64))
            writer.append(np.append(generator.integers(1, VOCABULARY, length - 1), 0))
        (folder / "recipe.yaml").write_text(write_recipe(recipe))
        done = subprocess.run(
            [sys.executable, "-P", "-c", TRAIN, "recipe.yaml", "run", kernels],
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        steps = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
        assert sum(step["num_targets"] for step in steps) == length, "not every token was trained on"
    found = re.search(r"peak (\d+)", done.stdout)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
