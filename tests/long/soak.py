"""Kills runs some hundred times at random moments and compares what comes out with runs that were never killed.

    python tests/long/soak.py --kills 200 --seed 1            # every soak below, so many kills each
    python tests/long/soak.py --kills 200 --seed 1 --soaks weights losses

A soak is a run of a tiny model in as many lives as it takes: single ranks or all of them are killed, asked to stop or
stopped, at the start, in a step, in an evaluation, in a save. Behind each life every checkpoint must be whole, the
newest must hold all but what came behind the last save, and the next life must begin there. At the end the run must be
the one that was never killed: to the last bit where every life had the same ranks; else in fp32 its losses to 1e-5 and
in fp64 its weights to 1e-10. Ends with 1 where anything differs. tests/fault/test_soak.py is the short form;
docs/reliability.md has figures.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: its threads would not survive a fork
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from launches import write_case
from struck_lives import PHASES, Life, Mode, Strike, draw_strike, run_life

from mambatrain.runs.checkpoint import find_damage, list_checkpoints, read_progress, step_of
from mambatrain.runs.folder import read_log

SAVE_EVERY, EVALUATE_EVERY = 3, 7  # steps
STEPS_PER_KILL = 4  # more than a life lasts, so that the run does not end before its kills
HANGS = 20  # every so manieth kill of several ranks is a rank that hangs, which takes the limit's time
HANG_SECONDS = 20.0
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-10  # relative; relative and absolute
TIMES_AND_RATES = {"seconds", "data_seconds", "tokens_per_second", "model_flops_utilisation", "memory_bytes"}

MODES = {
    "1 rank": Mode(1),
    "2 ranks": Mode(2),
    "4 ranks": Mode(4),
    "2 shards": Mode(2, "full"),
    "4 shards": Mode(4, "full"),
    "2 groups of 2 shards": Mode(4, "2"),
    "2 ranks a row": Mode(2, sequence=2),
    "4 ranks, 2 a row": Mode(4, sequence=2),
}
IN_BACKGROUND = {"checkpoint__asynchronous": True}
MAMBA2 = {"model__block": "mamba2", "model__head_dim": 16}


@dataclass(frozen=True)
class Soak:
    """What is run, in which modes, and how near it must come."""

    modes: tuple[str, ...]
    claim: str
    """`bits`, `losses` or `weights`."""
    kernels: str
    changes: dict[str, Any]


SOAKS = {
    "bits of 1 rank": Soak(("1 rank",), "bits", "native", {}),
    "bits of 2 ranks": Soak(("2 ranks",), "bits", "torch", MAMBA2),
    "bits of 2 shards": Soak(("2 shards",), "bits", "native", MAMBA2 | IN_BACKGROUND),
    "bits of 2 groups of 2 shards": Soak(("2 groups of 2 shards",), "bits", "torch", {}),
    "bits of 2 ranks a row": Soak(("2 ranks a row",), "bits", "torch", IN_BACKGROUND),
    "losses": Soak(tuple(MODES), "losses", "native", {"optimizer__learning_rate": 1e-3} | IN_BACKGROUND),
    "weights": Soak(tuple(MODES), "weights", "torch", {"training__precision": "fp64"} | MAMBA2),
}


class ClaimError(Exception):
    """A claim did not hold."""


def claim(holds: bool, what: str) -> None:
    if not holds:
        raise ClaimError(what)


def begin_recipe(file: Path, shards: Path, soak: Soak, kills: int) -> Path:
    changes = {
        "training__total_steps": STEPS_PER_KILL * kills + 10,
        "checkpoint__every_steps": SAVE_EVERY,
        "checkpoint__keep_newest": 2,
        "evaluation__every_steps": EVALUATE_EVERY,
    }
    return write_case(file, shards, changes | soak.changes)


def judge_life(soak: Soak, run: Path, before: Path | None, strike: Strike | None, life: Life) -> None:
    """
    Raises:
        ClaimError: a checkpoint is broken, something was lost, or the life did not begin at the newest one.
    """
    for checkpoint in list_checkpoints(run):
        claim(find_damage(checkpoint) is None, f"{find_damage(checkpoint)}")
    newest = newest_of(run)
    if found := re.search(r"^run .*?(?:, resumed at step ([\d,]+))?$", life.said, re.MULTILINE):
        resumed = int(found[1].replace(",", "")) if found[1] else 0
        claim(resumed == (step_of(before) if before else 0), f"resumed at step {resumed}, the newest was {before}")
    claim(before is None or (newest is not None and step_of(newest) >= step_of(before)), f"{newest} behind {before}")
    steps = [line["step"] for line in read_log(run / "log.jsonl")]
    lost = max(steps, default=0) - (step_of(newest) if newest else 0)
    # In the background a checkpoint may still be written when the next one is due.
    most = SAVE_EVERY * (2 if soak.changes.get("checkpoint__asynchronous") else 1)
    claim(lost <= most, f"{lost} steps lost")
    if strike is None or life.struck_in is None or (strike.kind.startswith("ask") and life.struck_in != "start"):
        claim(set(life.exit_codes) in ({0}, {75}), f"exit codes {life.exit_codes}")
        claim(lost == 0, f"{lost} steps lost by a life that was asked to stop")
    if strike is not None and strike.kind == "hang" and life.struck_in is not None:
        claim(f"process {strike.victim} of {len(life.exit_codes)}" in life.said, "the rank that hangs was not named")
    claim(life.said.count("Traceback") == 0, "a traceback")


def newest_of(run: Path) -> Path | None:
    """Every checkpoint is whole, so this is what the next life must begin with."""
    return next(reversed(list_checkpoints(run)), None)


def run_soak(name: str, soak: Soak, folder: Path, shards: Path, kills: int, seed: int) -> Counter[tuple[str, str]]:
    """Counts of strikes by kind and by where they fell.

    Raises:
        ClaimError: a claim did not hold.
    """
    rng = random.Random(f"{seed} {name}")
    recipe = begin_recipe(folder / "recipe.yaml", shards, soak, kills)
    whole, run = folder / "never killed", folder / "killed"
    undisturbed = run_life(recipe, whole, soak.kernels, MODES[soak.modes[0]], None)
    claim(set(undisturbed.exit_codes) == {0}, f"the run that is not killed: {undisturbed.said}")
    counts: Counter[tuple[str, str]] = Counter()
    struck = 0
    while True:
        mode = MODES[rng.choice(soak.modes)]
        strike = None if struck == kills else draw_strike(rng, mode, hang=struck % HANGS == HANGS - 1)
        before = newest_of(run)
        life = run_life(recipe, run, soak.kernels, mode, strike, HANG_SECONDS if strike else 600.0)
        try:
            judge_life(soak, run, before, strike, life)
        except ClaimError as error:
            raise ClaimError(f"kill {struck + 1} of {name!r}: {error}\n{mode}\n{strike}\n{life}\n{life.said}") from None
        counts["ranks that torchrun would have killed", ""] += life.stubborn
        if strike is None:
            break
        claim(life.struck_in is not None, f"the run ended before kill {struck + 1}")
        counts[strike.kind, str(life.struck_in)] += 1
        struck += 1
        if struck % 10 == 0:
            print(f"{name}: {struck} kills, step {max_step(run)}", file=sys.stderr, flush=True)
    compare(soak, run, whole)
    return counts


def max_step(run: Path) -> int:
    return max((line["step"] for line in read_log(run / "log.jsonl")), default=0)


def compare(soak: Soak, run: Path, whole: Path) -> None:
    """
    Raises:
        ClaimError: the run is not the one that was never killed.
    """
    logs = [
        [
            {key: value for key, value in line.items() if key not in TIMES_AND_RATES}
            for line in read_log(one / "log.jsonl")
        ]
        for one in (run, whole)
    ]
    ends = [list_checkpoints(one)[-1] for one in (run, whole)]
    moments = [[(line["event"], line["step"], line["draw"]) for line in log] for log in logs]
    claim(moments[0] == moments[1], "the logs tell of other steps")
    counters = [
        {key: getattr(read_progress(end), key) for key in ("step", "draw", "tokens_seen", "log_lines")} for end in ends
    ]
    claim(counters[0] == counters[1], f"{counters}")
    losses = [[line.get("loss", line.get("held_out_loss")) for line in log] for log in logs]
    relative = max(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(*losses, strict=True))
    print(f"  losses differ by {relative:.2g} at most, relative", flush=True)
    if soak.claim == "bits":
        claim(logs[0] == logs[1], "the logs differ")
        files = [{path.name: path.read_bytes() for path in end.iterdir()} for end in ends]
        differing = [name for name in files[1] if files[0].get(name) != files[1][name]]
        claim(files[0].keys() == files[1].keys() and not differing, f"{differing} differ")
    else:
        claim(relative <= (LOSS_TOLERANCE if soak.claim == "losses" else WEIGHT_TOLERANCE), "the losses differ")
    if soak.claim == "weights":
        farthest = farthest_weight(ends[0], ends[1])
        print(f"  weights differ by {farthest:.2g} at most", flush=True)
        claim(farthest <= WEIGHT_TOLERANCE, "the weights differ")


def farthest_weight(left: Path, right: Path) -> float:
    """The largest difference of two checkpoints' weights, over 1 + the weight."""
    from mambatrain.runs.weights import read_weights

    mine, theirs = (read_weights(str(checkpoint)).tensors for checkpoint in (left, right))
    claim(mine.keys() == theirs.keys(), "other weights")
    distances = [
        float(((mine[name].double() - value.double()).abs() / (1 + value.double().abs())).max())
        for name, value in theirs.items()
    ]
    return max(distances, key=lambda distance: math.inf if math.isnan(distance) else distance)


def print_table(counts: Counter[tuple[str, str]]) -> None:
    kinds = [kind for kind in ("all", "one", "ask all", "ask one", "hang") if any(kind == key[0] for key in counts)]
    print(f"  {'':10}" + "".join(f"{phase:>12}" for phase in PHASES))
    for kind in kinds:
        print(f"  {kind:10}" + "".join(f"{counts[kind, phase]:12}" for phase in PHASES))
    told = counts["ranks that torchrun would have killed", ""]
    print(f"  ranks that had to be killed when another one was gone: {told}", flush=True)


def make_shards(folder: Path) -> Path:
    """Tokens of some modules of the standard library."""
    from mambatrain.data.manifest import TokenizeOptions, TokenizerSettings
    from mambatrain.data.tokenize_corpus import tokenize_corpus
    from mambatrain.data.train_tokenizer import train_tokenizer

    sources = [Path(os.__file__).parent / f"{name}.py" for name in ("bisect", "calendar", "cmd", "csv", "dis", "heapq")]
    pid = os.fork()  # the tokenizer's threads must not be in the process that lives are forked of
    if pid:
        claim(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "no tokens were made")
        return folder / "shards"
    train_tokenizer(sources, folder / "tokenizer.json", TokenizerSettings(vocab_size=512, sample_bytes=1_000_000))
    tokenize_corpus(sources, folder / "tokenizer.json", folder / "shards", TokenizeOptions(held_out=0.2))
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of each soak")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--soaks", nargs="*", choices=list(SOAKS), default=list(SOAKS))
    parser.add_argument("--folder", type=Path, help="for the runs; kept where one fails")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    shards, total = make_shards(folder), 0
    for name in arguments.soaks:
        began = time.monotonic()
        print(f"{name}: {arguments.kills} kills, {', '.join(SOAKS[name].modes)}", flush=True)
        own = folder / name.replace(" ", "-")
        own.mkdir(exist_ok=True)
        try:
            counts = run_soak(name, SOAKS[name], own, shards, arguments.kills, arguments.seed)
        except ClaimError as error:
            print(f"FAILED: {error}\nwhat is left is in {own}", file=sys.stderr)
            return 1
        print_table(counts)
        print(f"  {time.monotonic() - began:.0f} seconds", flush=True)
        total += arguments.kills
    print(f"{total} kills, nothing lost")
    if arguments.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
