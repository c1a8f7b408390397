"""Runs one recipe in as many lives as it takes: `python lives.py RECIPE RUN SEED KILLS KERNELS [WEIGHTS]`.

Each life is a fork of this process, which has imported everything and computed nothing, so that a life costs no
start-up. It is killed with SIGKILL, KILLS times: every fifth at a random moment of its start, the others at a random
moment behind a random one of their first steps, so that they fall on steps, evaluations and saves however slow the
machine is. The last life is left alone. Prints a JSON list of what each killed life left: its newest whole checkpoint,
and whether it died in the middle of a save.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401
import safetensors.torch  # noqa: F401
import torch

import mambatrain.ops.backends  # noqa: F401
from mambatrain.recipe import read_recipe
from mambatrain.runs.checkpoint import newest_valid_checkpoint
from mambatrain.runs.weights import Weights, read_weights
from mambatrain.training.assemble import Where
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest


def live(recipe: str, run: Path, kernels: str, weights: Weights | None) -> None:
    torch.set_num_threads(1)
    where = Where(device="cpu", kernels=kernels, quiet=True)
    read = read_recipe(recipe, model=None if weights is None else weights.section)
    with StopRequest() as stop:
        os._exit(run_training(read, run, where, "if-possible", stop, weights))


def wait_for_lines(log: Path, child: int, lines: int) -> None:
    """Until the life has written so many lines (a resumed one cuts the log before), or has ended."""
    fewest = num_lines(log)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = num_lines(log)
        fewest = min(fewest, now)
        if now >= fewest + lines:
            return
        time.sleep(0.001)


def num_lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def main() -> None:
    recipe, run = sys.argv[1], Path(sys.argv[2])
    rng = random.Random(int(sys.argv[3]))
    kills, kernels = int(sys.argv[4]), sys.argv[5]
    weights = read_weights(sys.argv[6]) if len(sys.argv) > 6 else None
    lives = []
    for number in range(kills + 1):
        child = os.fork()
        if child == 0:
            live(recipe, run, kernels, weights)
        if number < kills:
            if number % 5:
                wait_for_lines(run / "log.jsonl", child, rng.randint(1, 6))
            time.sleep(rng.uniform(0.0, 0.03 if number % 5 else 0.5))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        newest = newest_valid_checkpoint(run)
        lives.append(
            {
                "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
                "checkpoint": newest.name if newest else None,
                "in_mid_save": any((run / "checkpoints").glob(".writing-*")),
            }
        )
    print(json.dumps(lives))


main()
