"""How much of a training step is not the model: rows, guards, logging, the loop itself.

    python -P tests/long/step_overhead.py RECIPE [--steps 60] [--set SECTION.FIELD=VALUE ...]

The model is its forward and backward passes, the clipping of gradients and the optimizer's step; what remains of a step
is overhead. Evaluations and checkpoints lie between steps and are left out. Prints medians over steps, the first few
left out; the run folder is removed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from mambatrain.recipe import Recipe, read_recipe
from mambatrain.runs.folder import read_log
from mambatrain.training import gradients, loop
from mambatrain.training.assemble import Where
from mambatrain.training.objective import NextTokenLoss
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

WARM_UP = 5  # steps: first calls and allocations


class Stopwatch:
    """Seconds spent in the calls it was put around, by step."""

    def __init__(self) -> None:
        self.by_step: list[float] = [0.0]

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.by_step[-1] += time.perf_counter() - started
            return result

        return timed

    def before_line(self, write: Callable[..., None]) -> Callable[..., None]:
        """The draw's log line ends a step."""

        def written(*args: Any, **kwargs: Any) -> None:
            write(*args, **kwargs)
            self.ends.append(time.perf_counter())
            self.by_step.append(0.0)

        self.ends: list[float] = []
        return written


def train_under(watch: Stopwatch, recipe: Recipe, run: Path) -> None:
    """Runs the recipe with the watch around whatever is the model's."""
    # Evaluation calls the model itself, not the objective: only training's calls are counted.
    with (
        mock.patch.object(NextTokenLoss, "forward", watch.around(NextTokenLoss.forward)),
        mock.patch.object(torch.Tensor, "backward", watch.around(torch.Tensor.backward)),
        mock.patch.object(gradients, "clip_gradients", watch.around(gradients.clip_gradients)),
        mock.patch.object(torch.optim.AdamW, "step", watch.around(torch.optim.AdamW.step)),
        mock.patch.object(loop, "write_draw", watch.before_line(loop.write_draw)),
    ):
        run_training(recipe, run, Where(device="cpu", quiet=True), "fresh", StopRequest())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name or file; it trains with AdamW")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    arguments = parser.parse_args()
    steps = [f"training.total_steps={arguments.steps}", "training.total_tokens=null"]
    rarely = [f"evaluation.every_steps={arguments.steps}", f"checkpoint.every_steps={arguments.steps}"]
    recipe = read_recipe(arguments.recipe, [*arguments.set, *steps, *rarely])
    with tempfile.TemporaryDirectory() as folder:
        watch = Stopwatch()
        train_under(watch, recipe, Path(folder) / "run")
        lines = [line for line in read_log(Path(folder) / "run" / "log.jsonl") if line["event"] == "step"]
    # From the end of one line to the end of the next: the line itself, its flush and the live line are in it.
    whole = [after - before for before, after in zip(watch.ends, watch.ends[1:], strict=False)][WARM_UP:]
    model = watch.by_step[1 : len(watch.ends)][WARM_UP:]
    rows = [line["data_seconds"] for line in lines[1:]][WARM_UP:]
    overhead = median(one - inside for one, inside in zip(whole, model, strict=True))
    print(f"step {median(whole) * 1e3:.2f} ms, of it the model {median(model) * 1e3:.2f} ms")
    print(f"overhead {overhead * 1e3:.2f} ms, {overhead / median(whole):.2%}; making rows {median(rows) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
