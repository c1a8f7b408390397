"""How long a save holds training up, waited for and in the background; a checkpoint's size and time.

    python -P tests/long/save_stall.py FOLDER [--recipes demo,mamba1-130m] [--repeats 7]

FOLDER is made on the disk that is measured, and removed. Both ways of one recipe take turns in one process, on weights
and AdamW's moments of the recipe's shape behind one update; medians. The loop's own `save` is timed: what it adds to a
step. `written` is how long the thread then takes beside an idle main thread, until the checkpoint has its name.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch

from mambatrain.adapters.trained import whole_model
from mambatrain.devices import choose_device, keep_freed_memory, start_accelerator
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import Recipe, read_recipe
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.runs.folder import RunFolder
from mambatrain.runs.progress import Progress
from mambatrain.training.metrics import LiveLine, RunReporter
from mambatrain.training.objective import NextTokenLoss
from mambatrain.training.optimizer import build_optimizers
from mambatrain.training.rank_watch import RankWatch
from mambatrain.training.saving import save
from mambatrain.training.training_run import TrainingRun


def begin(recipe: Recipe, path: Path, device: torch.device) -> TrainingRun:
    """A run behind its first update, without data: a save asks for none."""
    model = LanguageModel(recipe.model, choose_backend("torch", device))
    initialise(model, recipe.model, 0)
    model.to(device)
    trained, folder = whole_model(model), RunFolder(path)
    optimizers = build_optimizers(trained, recipe.optimizer)
    for parameter in trained.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    path.mkdir(parents=True)
    objective = NextTokenLoss(model)
    return TrainingRun(
        recipe=recipe,
        folder=folder,
        accelerator=start_accelerator(device, "fp32"),
        objective=objective,
        prepared=objective,
        trained=trained,
        frozen_sha256=None,
        optimizers=optimizers,
        order=None,
        held_out=None,
        micro_batch_rows=1,
        progress=Progress(),
        reporter=RunReporter(folder, LiveLine(1, 0, quiet=True), None, writes=True),
        row_share=None,
        carried=None,
        watch=RankWatch(0, 1, None, 1.0),
        flops_per_token=0.0,
        peak_flops=0.0,
    )


def seconds_of_a_save(run: TrainingRun, asynchronous: bool) -> tuple[float, float]:
    """What the loop waits, and what passes until the checkpoint is there."""
    checkpoint = run.recipe.checkpoint.model_copy(update={"asynchronous": asynchronous, "keep_best": False})
    run.recipe = run.recipe.model_copy(update={"checkpoint": checkpoint})
    run.progress.step += 1
    run.progress.log_lines += 1
    run.reporter.write_event({"event": "step", "step": run.progress.step})
    started = time.perf_counter()
    save(run)
    stall = time.perf_counter() - started
    run.background.finish()
    return stall, time.perf_counter() - started


def measure(name: str, folder: Path, repeats: int, device: torch.device) -> None:
    run = begin(read_recipe(name), folder / name, device)
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for turn in range(repeats + 1):
        for asynchronous in (False, True):
            measured = seconds_of_a_save(run, asynchronous)
            if turn:  # the first has memory to touch
                times[asynchronous].append(measured)
    run.reporter.close()
    newest = list_checkpoints(run.folder.path)[-1]
    megabytes = sum(file.stat().st_size for file in newest.iterdir()) / 1e6
    waited, stall, written = (
        statistics.median(one[which] for one in times[asynchronous])
        for asynchronous, which in ((False, 0), (True, 0), (True, 1))
    )
    print(
        f"{name}: {megabytes:,.0f} MB; waited for {waited * 1e3:,.1f} ms; in the background {stall * 1e3:,.1f} ms, "
        f"{stall / waited:.1%} of that, written after {written * 1e3:,.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipes", default="demo,mamba1-130m")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    device = choose_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    options.folder.mkdir()
    try:
        for name in options.recipes.split(","):
            measure(name, options.folder, options.repeats, device)
    finally:
        shutil.rmtree(options.folder)


main()
