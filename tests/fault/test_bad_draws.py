"""Nothing bad is applied: a draw with a loss or gradient that is not finite moves neither weights nor schedule."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mambatrain.data.drawn_rows import rows_of_draw
from mambatrain.data.training_data import open_training_data
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
    with pytest.raises(UserError, match="10 draws in a row were skipped") as raised:
        run_training(recipe, tmp_path / "run", WHERE, "if-possible", StopRequest())
    assert "and 17 more that are not finite" in raised.value.message
    assert "embedding.weight (nan)" in raised.value.message
    order = open_training_data(recipe).order
    shown = {n for draw in range(4, 14) for row in rows_of_draw(order, draw) for n in row.documents}
    assert f"{order.names[0]}: documents {', '.join(map(str, sorted(shown)))}" in raised.value.message
    assert "data.skip_draws=[[4,13]]" in (raised.value.hint or "")
    last = read_log(tmp_path / "run" / "log.jsonl")[-1]
    assert set(last["documents"][order.names[0]]) <= shown
    assert len(last["gradients"]) == 6
    assert read_progress(list_checkpoints(tmp_path / "run")[-1]).step == 4


def test_a_gradient_that_is_not_finite_is_blamed_and_its_neighbours_are_not(
    monkeypatch: pytest.MonkeyPatch, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = read_recipe(str(write_tiny_recipe(training__total_steps=3)))
    forward = NextTokenLoss.forward

    def spoilt(self: NextTokenLoss, *batch: Tensor) -> Tensor:
        gate = self.model.norm_f.weight
        return forward(self, *batch) + InfiniteGradient.apply(gate.sum() - gate.sum().detach())

    monkeypatch.setattr(NextTokenLoss, "forward", spoilt)
    with pytest.raises(UserError, match=r"gradients of draw 9: norm_f\.weight \(inf\)\n"):
        run_training(recipe, tmp_path / "run", WHERE, "if-possible", StopRequest())


def test_a_spike_is_skipped_and_what_it_is_judged_by_survives_a_resume(
    monkeypatch: pytest.MonkeyPatch, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    guards = {"max_sigma": 6.0, "memory_draws": 8}
    recipe = read_recipe(
        str(write_tiny_recipe(guards=guards, checkpoint={"every_steps": 1, "keep_newest": 99}, evaluation=None))
    )
    poison_draws(monkeypatch, {8}, lambda loss: loss * 3.0)
    assert run_training(recipe, tmp_path / "run", WHERE, "if-possible", StopRequest()) == 0
    skipped = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["event"] == "skipped"]
    assert [(line["draw"], line["step"]) for line in skipped] == [(8, 8)]
    assert "deviations above" in skipped[0]["reason"]
    *earlier, last = list_checkpoints(tmp_path / "run")
    whole = {file.name: file.read_bytes() for file in last.iterdir()}
    assert read_progress(last).running["loss"].count == 8
    for checkpoint in [*earlier[7:], last]:
        shutil.rmtree(checkpoint)
    poison_draws(monkeypatch, {1}, lambda loss: loss * 3.0)  # draw 8 again: the second of this life
    assert run_training(recipe, tmp_path / "run", WHERE, "if-possible", StopRequest()) == 0
    assert {file.name: file.read_bytes() for file in list_checkpoints(tmp_path / "run")[-1].iterdir()} == whole


def test_draws_that_the_recipe_names_are_passed_over(write_tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    data = {"data__skip_draws": [[2, 3], [6, 6]], "training__total_steps": 6}
    recipe = read_recipe(str(write_tiny_recipe(**data)))
    assert run_training(recipe, tmp_path / "run", WHERE, "if-possible", StopRequest()) == 0
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["draw"] for line in log if line["event"] == "step"] == [0, 1, 4, 5, 7, 8]
    passed = [(line["draw"], line["last_draw"]) for line in log if line["event"] == "passed_over"]
    assert passed == [(2, 3), (6, 6)]
    assert read_progress(list_checkpoints(tmp_path / "run")[-1]).log_lines == len(log)
    with pytest.raises(UserError, match=r"skip_draws holds \[5, 4\]"):
        read_recipe(str(write_tiny_recipe(data__skip_draws=[[5, 4]])))
