"""Nothing bad is applied: a draw with a loss or gradient that is not finite moves neither weights nor schedule."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mambatrain.errors import UserError
from mambatrain.recipe import read_recipe
from mambatrain.runs.checkpoint import list_checkpoints, read_progress
from mambatrain.runs.folder import read_log
from mambatrain.training.assemble import Where
from mambatrain.training.objective import NextTokenLoss
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

WHERE = Where(device="cpu", kernels="torch", quiet=True)
Poison = Callable[[Tensor], Tensor]


def poison_draws(monkeypatch: pytest.MonkeyPatch, poisoned: set[int], poison: Poison) -> None:
    """The objective's loss is spoilt in the forward passes of some draws (one micro-batch a draw)."""
    forward, calls = NextTokenLoss.forward, [0]

    def spoilt(self: NextTokenLoss, *batch: Tensor) -> Tensor:
        calls[0] += 1
        loss = forward(self, *batch)
        return poison(loss) if calls[0] - 1 in poisoned else loss

    monkeypatch.setattr(NextTokenLoss, "forward", spoilt)


class InfiniteGradient(torch.autograd.Function):
    """The value as it is, and a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


@pytest.mark.parametrize(
    ("poison", "said"),
    [(lambda loss: loss * math.nan, "the loss is nan"), (InfiniteGradient.apply, "the gradient norm is")],
    ids=["loss", "gradient"],
)
def test_a_bad_draw_is_skipped_and_said(
    monkeypatch: pytest.MonkeyPatch, write_tiny_recipe: Callable[..., Path], tmp_path: Path, poison: Poison, said: str
) -> None:
    recipe = read_recipe(
        str(write_tiny_recipe(training__total_steps=6, checkpoint__every_steps=1, checkpoint__keep_newest=9))
    )
    poison_draws(monkeypatch, {2, 3}, poison)
    assert run_training(recipe, tmp_path / "run", WHERE, "if-possible", StopRequest()) == 0
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["event"] != "held_out"]
    assert [line["event"] for line in lines] == ["step"] * 2 + ["skipped"] * 2 + ["step"] * 4
    assert [line["draw"] for line in lines] == list(range(8)), "the data goes on"
    assert [line["step"] for line in lines] == [1, 2, 2, 2, 3, 4, 5, 6], "the schedule waits"
    assert lines[2]["learning_rate"] == lines[4]["learning_rate"]
    assert said in lines[2]["reason"]
    final = load_file(list_checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in final.values())


def test_a_run_that_only_meets_bad_draws_ends_with_its_checkpoint_whole(
    monkeypatch: pytest.MonkeyPatch, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = read_recipe(str(write_tiny_recipe(training__total_steps=20)))
    poison_draws(monkeypatch, set(range(4, 100)), lambda loss: loss * math.nan)
    with pytest.raises(UserError, match="10 draws in a row were skipped"):
        run_training(recipe, tmp_path / "run", WHERE, "if-possible", StopRequest())
    assert read_progress(list_checkpoints(tmp_path / "run")[-1]).step == 4
