"""Rows that go on from the state of the draw before: what they are trained on, what a gap leaves, and what is saved."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from mambatrain.data.token_shards import TokenShardWriter
from mambatrain.data.training_data import open_training_data
from mambatrain.devices import end_processes
from mambatrain.errors import UserError
from mambatrain.models.state import BlockState
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import Recipe, read_recipe
from mambatrain.runs.average import average_checkpoints
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.runs.folder import RunFolder, read_log
from mambatrain.training.assemble import Where
from mambatrain.training.build import build_model, fill_parameters
from mambatrain.training.objective import NextTokenLoss
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

WHERE = Where(device="cpu", kernels="torch", quiet=True)
ROW, SLOTS = 16, 4
# A rate at which no weight of fp64 moves: then one model can say what every draw of a run should come to.
STILL = {"learning_rate": 1e-30, "weight_decay": 0.0}
ReadRecipe = Callable[..., Recipe]


@pytest.fixture
def carried_recipe(write_tiny_recipe: Callable[..., Path], tmp_path: Path) -> Iterator[ReadRecipe]:
    """A recipe of short documents and long ones, nothing held out, in segments of 5 tokens."""
    generator = np.random.default_rng(2)
    with TokenShardWriter(tmp_path / "tokens", np.dtype("<u2")) as writer:
        for length in (1, 70, 9, 120, 14, 33, 90, 21, 200, 5):
            writer.append(np.append(generator.integers(1, 512, length - 1), 0))

    def read(**changes: Any) -> Recipe:
        data = {"shards": str(tmp_path / "tokens"), "row_tokens": ROW, "seed": 3, "carry_state": True}
        training = {"rows_per_step": SLOTS, "total_steps": 10, "precision": "fp64", "segment_tokens": 5}
        training |= {"micro_batch_rows": 2}
        return read_recipe(str(write_tiny_recipe(**{"data": data, "training": training, **changes})))

    AcceleratorState._reset_state()  # precisions differ from test to test
    yield read
    end_processes()
    AcceleratorState._reset_state()


def train(recipe: Recipe, folder: Path, branch_from: Path | None = None) -> list[dict[str, Any]]:
    assert run_training(recipe, folder, WHERE, "if-possible", StopRequest(), branch_from=branch_from) == 0
    return read_log(folder / "log.jsonl")


class Independent:
    """The first weights of a recipe, and what its slots are shown."""

    def __init__(self, recipe: Recipe) -> None:
        self.model = build_model(recipe, choose_backend("torch", torch.device("cpu")), torch.device("cpu"), "fp64", 1)
        self.model.segment_tokens = 0
        fill_parameters(self.model, recipe, None)
        order = open_training_data(recipe).order
        self.draws = [order.micro_batches(draw, SLOTS)[0] for draw in range(12)]

    def state_behind(self, draw: int) -> list[BlockState]:
        """By one plain forward pass over all that the slots were shown in draws 0 .. draw."""
        tokens = torch.cat([batch.tokens for batch in self.draws[: draw + 1]], dim=1)
        boundaries = torch.cat([batch.boundaries for batch in self.draws[: draw + 1]], dim=1)
        with torch.no_grad():
            return self.model.hidden_states(tokens, boundaries)[1]

    def loss_and_norm(self, draw: int, state: list[BlockState] | None) -> tuple[float, float]:
        """Of a draw whose rows go on from a state, nats per target and norm of the gradient."""
        batch = self.draws[draw]
        self.model.zero_grad()
        loss = self.model.summed_loss(*batch.inputs, state) / batch.num_targets
        loss.backward()
        squares = sum(float(p.grad.square().sum()) for p in self.model.parameters() if p.grad is not None)
        return float(loss.detach()), math.sqrt(squares)


def reported(line: dict[str, Any]) -> tuple[float, float]:
    return line["loss"], line["gradient_norm"]


def test_each_draw_goes_on_from_a_plain_forward_pass_over_everything_before(
    carried_recipe: ReadRecipe, tmp_path: Path
) -> None:
    recipe = carried_recipe(optimizer=STILL)
    lines, independent = train(recipe, tmp_path / "run"), Independent(recipe)
    assert [line["draw"] for line in lines] == list(range(10))
    differences = []
    for line in lines:
        state = independent.state_behind(line["draw"] - 1) if line["draw"] else None
        assert reported(line) == pytest.approx(independent.loss_and_norm(line["draw"], state), rel=1e-10)
        differences.append(abs(independent.loss_and_norm(line["draw"], None)[0] - line["loss"]))
    assert max(differences) > 1e-6, "the state makes no difference: nothing was tested"
    saved = load_file(list_checkpoints(tmp_path / "run")[-1] / "extra.safetensors")
    for number, layer in enumerate(independent.state_behind(9)):
        torch.testing.assert_close(saved[f"extra.carried.layers.{number}.ssm"], layer.ssm, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(saved[f"extra.carried.layers.{number}.window"], layer.window, rtol=1e-10, atol=1e-12)


def states_across_a_gap(independent: Independent, first: int, last: int) -> list[BlockState]:
    """What draw last + 1 goes on from where `first` to `last` were not applied: nothing, if a document began there."""
    before = independent.state_behind(first - 1)
    began = torch.cat([batch.boundaries for batch in independent.draws[first : last + 1]], dim=1).any(1)
    assert 0 < began.sum() < SLOTS, "no slot, or each, begins another document in the gap"
    return [BlockState(*(tensor.masked_fill(began[:, None, None], 0.0) for tensor in layer)) for layer in before]


def test_a_skipped_draw_leaves_the_states_of_before_but_never_those_of_another_document(
    monkeypatch: pytest.MonkeyPatch, carried_recipe: ReadRecipe, tmp_path: Path
) -> None:
    recipe = carried_recipe(optimizer=STILL)
    forward, calls = NextTokenLoss.forward, [0]

    def spoilt(self: NextTokenLoss, *batch: Any) -> Tensor:
        calls[0] += 1
        loss = forward(self, *batch)
        if calls[0] == 2 * 7 + 1:  # the first micro-batch of draw 7: a state behind it alone
            self.behind = [BlockState(layer.window, layer.ssm * math.inf) for layer in self.behind]
        return loss * math.nan if calls[0] == 2 * 5 + 2 else loss  # the second of draw 5

    monkeypatch.setattr(NextTokenLoss, "forward", spoilt)
    lines = train(recipe, tmp_path / "run")
    skipped = {line["draw"]: line["reason"] for line in lines if line["event"] == "skipped"}
    assert skipped == {5: "the loss is nan", 7: "a state that the next rows would go on from is not finite"}
    independent = Independent(recipe)
    found = reported(next(line for line in lines if line["draw"] == 6))
    assert found == pytest.approx(independent.loss_and_norm(6, states_across_a_gap(independent, 5, 5)), rel=1e-10)
    assert found[0] != pytest.approx(independent.loss_and_norm(6, independent.state_behind(4))[0], rel=1e-10)
    assert all(math.isfinite(line["loss"]) for line in lines if line["event"] == "step")


def test_draws_that_are_passed_over_are_a_gap_too(carried_recipe: ReadRecipe, tmp_path: Path) -> None:
    recipe = carried_recipe(optimizer=STILL)
    data = recipe.data.model_copy(update={"skip_draws": [[4, 5]]})
    recipe = recipe.model_copy(update={"data": data})
    lines, independent = train(recipe, tmp_path / "run"), Independent(recipe)
    found = reported(next(line for line in lines if line.get("loss") and line["draw"] == 6))
    assert found == pytest.approx(independent.loss_and_norm(6, states_across_a_gap(independent, 4, 5)), rel=1e-10)


def test_resumed_and_branched_runs_go_on_from_the_states_to_the_bit_and_an_average_has_none(
    carried_recipe: ReadRecipe, tmp_path: Path
) -> None:
    training = {"rows_per_step": SLOTS, "total_steps": 6, "precision": "bf16", "segment_tokens": 5}
    recipe = carried_recipe(training=training, checkpoint={"every_steps": 2, "keep_newest": 9})
    train(recipe, tmp_path / "whole")
    first, _, last = list_checkpoints(tmp_path / "whole")
    wanted = {file.name: file.read_bytes() for file in last.iterdir()}
    saved = load_file(last / "extra.safetensors")
    assert (saved["extra.carried.layers.1.ssm"].dtype, saved["extra.carried.layers.1.ssm"].shape[0]) == (
        torch.float32,
        SLOTS,
    )

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for checkpoint in list_checkpoints(tmp_path / "resumed")[1:]:
        shutil.rmtree(checkpoint)
    train(recipe, tmp_path / "resumed")
    train(recipe, tmp_path / "branch", branch_from=first)
    for run in ("resumed", "branch"):
        found = list_checkpoints(tmp_path / run)[-1]
        assert {file.name: file.read_bytes() for file in found.iterdir()} == wanted, run

    average_checkpoints(RunFolder(tmp_path / "whole"), 2, tmp_path / "average")
    assert not any("carried" in name for name in load_file(tmp_path / "average" / "model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"data__packing": "best_fit"},
            "carry_state follows the documents of data.shards; packing does not go with it",
        ),
        ({"data__stages": [{"from_tokens": 128, "row_tokens": 64}]}, "stages does not go with it"),
        ({"data__shards": None, "data__sources": [{"shards": "a", "weight": 1}]}, "sources does not go with it"),
        ({"data__shards": None, "data__chats": {"files": ["a.jsonl"]}}, "chats does not go with it"),
        ({"adapter": {"kind": "state"}}, "data.carry_state does not go with adapter.kind state"),
        ({"training__segment_tokens": 32}, "training.segment_tokens 32 does nothing for rows of 32"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    write_tiny_recipe: Callable[..., Path], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_recipe(str(write_tiny_recipe(data__carry_state=True, **changes)))
    assert said in caught.value.message
