"""One process of a launch in which rank 1 alone is unwell: `one_bad_rank.py RECIPE FOLDER`, under torchrun.

FOLDER/CASE of each: a loss that is NaN, a gradient of one parameter that is infinite, with copies and with shards, in
draws 2 and 3; and a rank that sees an older state of the run folder than the others.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambatrain.devices import end_processes
from mambatrain.recipe import read_recipe
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.training import start
from mambatrain.training.assemble import Where
from mambatrain.training.objective import NextTokenLoss
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

FORWARD = NextTokenLoss.forward


class InfiniteGradient(torch.autograd.Function):
    """The value as it is, and a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = math.inf
        return gradient


def spoil(fault: str) -> None:
    """In the third and fourth forward pass of training (one micro-batch a draw)."""
    calls = 0

    def spoilt(self: NextTokenLoss, *batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls not in {3, 4}:
            return FORWARD(self, *batch)
        if fault == "nan":
            return FORWARD(self, *batch) * math.nan
        norm = self.model.norm_f
        hook = norm.register_forward_hook(lambda module, inputs, output: InfiniteGradient.apply(output))
        try:
            return FORWARD(self, *batch)
        finally:
            hook.remove()

    NextTokenLoss.forward = spoilt  # type: ignore[method-assign]


def run_case(recipe: Path, run: Path, shard: str) -> None:
    where = Where(device="cpu", kernels="torch", shard=shard)
    assert run_training(read_recipe(str(recipe)), run, where, "if-possible", StopRequest()) == 0


def main() -> None:
    recipe, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    is_bad = os.environ["RANK"] == "1"
    for fault in ("nan", "inf"):
        for shard in ("no", "full"):
            if is_bad:
                spoil(fault)
            run_case(recipe, folder / f"{fault}-{shard}", shard)
            NextTokenLoss.forward = FORWARD  # type: ignore[method-assign]
    run_case(recipe, folder / "whole", "no")
    run_case(recipe, folder / "old-state", "no")
    if os.environ["RANK"] == "0":
        newest = list_checkpoints(folder / "old-state")[-1]
        newest.rename(newest.with_name("set-aside"))
    torch.distributed.barrier()
    if is_bad:
        start.checkpoint_to_resume = lambda run, damaged: list_checkpoints(run)[0]
    run_case(recipe, folder / "old-state", "no")
    end_processes()


main()
