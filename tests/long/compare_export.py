"""A trained run and the folder it was exported to, the second in `transformers`: held-out loss, and scores of tasks.

    mambatrain export RUN EXPORT
    python tests/long/compare_export.py RUN EXPORT SHARDS
    python tests/long/compare_export.py RUN EXPORT SHARDS --task-data lambada_openai=FILE --task-data arc_easy=FILE

Too long for the suite, where tests/unit/export and tests/parity/harness show the same on tiny random models; the
figures stand in docs/benchmarks.md. Ends with 1 where the two disagree.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from mambatrain.data.batches import MicroBatch
from mambatrain.evaluation.held_out_text import find_held_out_text

HELD_OUT_TOLERANCE = 1e-3  # nats per token
MAX_LENGTH = 2048  # tokens of a task's text
SCORE_TOLERANCE = 1e-4  # relative; an accuracy of 500 questions moves by 2e-3 with one answer


def evaluate_run(run: Path, shards: Path, task_data: list[str]) -> dict[str, Any]:
    """What `mambatrain evaluate` says."""
    options: list[str | Path] = ["--data", shards]
    if task_data:
        options += ["--tasks", ",".join(pair.partition("=")[0] for pair in task_data), "--max-length", str(MAX_LENGTH)]
    for pair in task_data:
        options += ["--task-data", pair]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scores.json"
        command = [sys.executable, "-m", "mambatrain", "evaluate", run, "--json", file, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results: dict[str, Any] = json.loads(file.read_text())
    return results


def held_out_by_transformers(export: Path, run: Path, shards: Path) -> float:
    """Nats per token of the run's held-out text.

    transformers knows no boundaries: what lies between two goes through the model alone.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    text = find_held_out_text(str(run), shards)
    nats, num_targets = 0.0, 0
    with torch.no_grad():
        for row in text.batches.micro_batches(1):
            for tokens, targets in segments(row):
                logits = model(tokens[None], use_cache=False).logits[0]
                nats += float(F.cross_entropy(logits.double(), targets, reduction="sum"))
                num_targets += int((targets >= 0).sum())
    return nats / num_targets


def segments(row: MicroBatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The parts of one row that belong to one document each: tokens and targets (L,)."""
    starts = row.boundaries[0].nonzero()[:, 0].tolist()
    cuts = sorted({0, *starts, row.tokens.shape[1]})
    return [(row.tokens[0, a:b], row.targets[0, a:b]) for a, b in pairwise(cuts)]


def scores_by_lm_eval(export: Path, task_data: list[str]) -> dict[tuple[str, str, str], float]:
    """(task, metric, filter) -> score, by lm-eval's own `hf` model."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from mambatrain.evaluation.harness import load_tasks

    logging.disable(logging.WARNING)
    files = {name: Path(file) for name, _, file in (pair.partition("=") for pair in task_data)}
    model = HFLM(pretrained=str(export), device="cpu", dtype="float32", max_length=MAX_LENGTH, batch_size=16)
    results = evaluate(lm=model, task_dict=load_tasks(list(files), task_data=files), bootstrap_iters=0)
    return {
        (task, *key.split(",")): value
        for task, entries in results["results"].items()
        for key, value in entries.items()
        if "," in key and "_stderr" not in key and isinstance(value, float)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("shards", type=Path, help="what the run was trained on")
    parser.add_argument("--task-data", action="append", default=[], metavar="NAME=FILE")
    arguments = parser.parse_args()
    ours = evaluate_run(arguments.run, arguments.shards, arguments.task_data)
    loss, same = held_out_by_transformers(arguments.export, arguments.run, arguments.shards), True

    def show(what: str, own: float, theirs: float, tolerance: float) -> None:
        nonlocal same
        same = same and abs(own - theirs) <= tolerance
        print(f"{what:<36} {own:>12.6f} {theirs:>14.6f} {abs(own - theirs):>12.2e}", flush=True)

    print(f"{'':<36} {'mambatrain':>12} {'transformers':>14} {'apart':>12}")
    show("held out, nats per token", ours["held_out"]["nats_per_token"], loss, HELD_OUT_TOLERANCE)
    if arguments.task_data:
        theirs = scores_by_lm_eval(arguments.export, arguments.task_data)
        for score in ours["tasks"]:
            other = theirs[score["task"], score["metric"], score["filter"]]
            show(f"{score['task']}, {score['metric']}", score["value"], other, SCORE_TOLERANCE * abs(other))
    sys.exit(0 if same else "the two disagree")


if __name__ == "__main__":
    main()
