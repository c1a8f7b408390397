"""What more processes cost: time of a step, memory of a rank, bytes between ranks. CPU processes over gloo.

    python -P tests/long/cost_against_size.py RECIPE [--steps 8] [--repeats 3] [--set SECTION.FIELD=VALUE ...]

Each division of the model runs in turn, `--repeats` times, one thread a process; medians. Bytes are those that the
loopback interface counted (Linux), the difference of a longer and a shorter run, so that starting, evaluating and
saving are not in them: nothing else may talk over it meanwhile. Computed are the bytes that an ideal ring sends, over
all ranks: 2 (n - 1) times the gradients for DDP; (n - 1) times two gathers of the weights (the root's unit once: it
stays until the backward pass) and one scatter of the gradients for FSDP.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mambatrain.models.flops import count_parameters
from mambatrain.models.parameters import parameter_shapes
from mambatrain.recipe import Recipe, read_recipe
from mambatrain.runs.folder import read_log

DIVISIONS = [(1, "no"), (2, "no"), (2, "full"), (4, "no"), (4, "full"), (4, "2")]
WARM_UP = 2  # steps


@dataclass(frozen=True)
class Cost:
    """Of one run."""

    seconds: float
    """Median of its steps."""
    memory: int
    """Peak resident bytes of rank 0, libraries included."""
    wire: int
    """Bytes over the loopback interface, from start to end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name or file, in fp32")
    parser.add_argument("--steps", type=int, default=8, help="that the longer runs have more than the shorter")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe, arguments.set)
    shorter, longer = 2, 2 + arguments.steps
    found: dict[tuple[int, str], list[tuple[Cost, Cost]]] = {division: [] for division in DIVISIONS}
    for _ in range(arguments.repeats):
        for division in DIVISIONS:
            runs = [measure(arguments.recipe, arguments.set, division, steps) for steps in (shorter, longer)]
            found[division].append((runs[0], runs[1]))
    print(f"{count_parameters(recipe.model)['total']:,} parameters, {recipe.tokens_per_step:,} tokens a step")
    print("| processes | shard | seconds a step | MB of rank 0 | MB a step | computed |")
    print("|--:|---|--:|--:|--:|--:|")
    for (processes, shard), pairs in found.items():
        seconds, memory = median(long.seconds for _, long in pairs), median(long.memory for _, long in pairs)
        wire = median((long.wire - short.wire) / arguments.steps for short, long in pairs)
        computed = bytes_of_a_step(recipe, processes, shard)
        of_a_step = f"{wire / 1e6:,.0f} | {computed / 1e6:,.0f}"
        print(f"| {processes} | {shard} | {seconds:.2f} | {memory / 1e6:,.0f} | {of_a_step} |")


def measure(recipe: str, settings: list[str], division: tuple[int, str], steps: int) -> Cost:
    """One run of so many steps in a folder of its own."""
    processes, shard = division
    own = [f"training.total_steps={steps}", "training.total_tokens=null", "training.precision=fp32"]
    rarely = ["evaluation.every_steps=1000", "checkpoint.every_steps=1000"]
    chosen = [part for setting in [*settings, *own, *rarely] for part in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-P", "-m", "mambatrain", "pretrain", recipe, "--run", run, "--device", "cpu"]
        before = loopback_bytes()
        subprocess.run(
            [*command, "--processes", str(processes), "--shard", shard, "--quiet", *chosen],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        wire = loopback_bytes() - before
        lines = [line for line in read_log(run / "log.jsonl") if line["event"] == "step"]
    seconds = median(line["seconds"] for line in lines[min(WARM_UP, len(lines) - 1) :])
    return Cost(seconds, lines[-1]["memory_bytes"], wire)


def loopback_bytes() -> int:
    """What the loopback interface has received so far."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def bytes_of_a_step(recipe: Recipe, processes: int, shard: str) -> int:
    """What an ideal ring sends, over all ranks, in fp32."""
    sizes = {name: 4 * math.prod(shape) for name, shape in parameter_shapes(recipe.model).items()}
    whole, layers = sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith("layers."))
    if shard == "no":
        return 2 * (processes - 1) * whole
    shards = processes if shard == "full" else int(shard)
    groups = processes // shards
    within = groups * (shards - 1) * (2 * layers + (whole - layers) + whole)
    return within + 2 * (groups - 1) * whole  # each shard is summed over the groups: a ring of `groups`, `shards` times


if __name__ == "__main__":
    main()
