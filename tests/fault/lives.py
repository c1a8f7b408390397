"""Runs one recipe in as many lives as it takes: `python lives.py RECIPE RUN SEED KILLS KERNELS [WEIGHTS]`.

Each life is a fork of this process, which has imported everything and computed nothing, so that a life costs no
start-up. It is killed with SIGKILL, KILLS times: every fifth at a random moment of its start, the others at a random
moment behind a random one of their first steps, so that they fall on steps, evaluations and saves however slow the
machine is. Where the recipe saves in the background, every other life kills itself there, in place of a random fsync,
when training has gone on beside it. The last life is left alone. Prints a JSON list of what each killed life left: its
newest whole checkpoint, whether it died in the middle of a save, and whether it had trained on during that.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import accelerate  # noqa: F401
import safetensors.torch  # noqa: F401
import torch

import mambatrain.ops.backends  # noqa: F401
from mambatrain.recipe import read_recipe
from mambatrain.runs.checkpoint import newest_valid_checkpoint
from mambatrain.runs.folder import read_log
from mambatrain.runs.weights import Weights, read_weights
from mambatrain.training.assemble import Where
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

SYNCS_IN_A_SAVE = 10  # log, model, optimizer, progress (3), manifest (2), the folder, its name


def live(recipe: str, run: Path, kernels: str, weights: Weights | None, dies_at_sync: int | None) -> None:
    torch.set_num_threads(1)
    if dies_at_sync is not None:
        die_beside_training(dies_at_sync, run / "log.jsonl")
    where = Where(device="cpu", kernels=kernels, quiet=True)
    read = read_recipe(recipe, model=None if weights is None else weights.section)
    with StopRequest() as stop:
        os._exit(run_training(read, run, where, "if-possible", stop, weights))


def die_beside_training(sync: int, log: Path) -> None:
    """Is killed in place of the n-th fsync outside the main thread, behind the next line that the main thread logs."""
    fsync, num_syncs, lines_before = os.fsync, 0, 0

    def counted(descriptor: int) -> None:
        nonlocal num_syncs, lines_before
        if threading.current_thread() is not threading.main_thread():
            if num_syncs % SYNCS_IN_A_SAVE == 0:
                lines_before = num_lines(log)
            num_syncs += 1
            if num_syncs == sync:
                last = time.monotonic() + 20  # at the end of the run no line comes
                while num_lines(log) <= lines_before and time.monotonic() < last:
                    time.sleep(0.001)
                os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counted


def last_step(log: Path) -> int:
    return max((line["step"] for line in read_log(log) if line["event"] == "step"), default=0)


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
    in_background = read_recipe(recipe, model=None if weights is None else weights.section).checkpoint.asynchronous
    for number in range(kills + 1):
        by_itself = in_background is True and number < kills and number % 2 == 1
        dies_at_sync = rng.randint(1, 2 * SYNCS_IN_A_SAVE) if by_itself else None
        child = os.fork()
        if child == 0:
            live(recipe, run, kernels, weights, dies_at_sync)
        if number < kills and not by_itself:
            if number % 5:
                wait_for_lines(run / "log.jsonl", child, rng.randint(1, 6))
            time.sleep(rng.uniform(0.0, 0.03 if number % 5 else 0.5))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        newest = newest_valid_checkpoint(run)
        unfinished = [int(folder.name[-8:]) for folder in (run / "checkpoints").glob(".writing-*")]
        lives.append(
            {
                "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
                "checkpoint": newest.name if newest else None,
                "in_mid_save": bool(unfinished),
                "trained_on": bool(unfinished) and last_step(run / "log.jsonl") > unfinished[0],
            }
        )
    print(json.dumps(lives))


main()
