"""A branch goes on from another run's checkpoint: the same past and the next tokens, another future."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mambatrain.devices import end_processes
from mambatrain.errors import UserError
from mambatrain.recipe import Recipe, read_recipe
from mambatrain.runs.branch import read_branching
from mambatrain.runs.checkpoint import find_damage, list_checkpoints
from mambatrain.runs.folder import RunFolder, read_log
from mambatrain.training.assemble import Where
from mambatrain.training.schedule import learning_rate_at
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

WHERE = Where(device="cpu", kernels="torch", quiet=True)
FILES = ("model.safetensors", "optimizer.safetensors", "progress.json")
OF_A_CLOCK = {"seconds", "data_seconds", "tokens_per_second", "model_flops_utilisation", "memory_bytes"}


@pytest.fixture
def origin(write_tiny_recipe: Callable[..., Path], tmp_path: Path) -> Iterator[Path]:
    """A run of 12 steps with checkpoints at 4, 8 and 12, at a constant rate."""
    recipe = write_tiny_recipe(
        schedule={"kind": "constant", "warmup_steps": 2}, checkpoint__keep_newest=9, checkpoint__keep_best=False
    )
    train(read_recipe(str(recipe)), tmp_path / "origin")
    yield tmp_path / "origin"
    end_processes()


def train(recipe: Recipe, folder: Path, branch_from: Path | None = None) -> None:
    assert run_training(recipe, folder, WHERE, "if-possible", StopRequest(), branch_from=branch_from) == 0


def changed(origin: Path, *overrides: str) -> Recipe:
    return read_recipe(str(origin / "recipe.yaml"), list(overrides))


def timeless(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in OF_A_CLOCK} for line in log]


def test_a_branch_that_changes_nothing_is_the_run_itself_to_the_bit(origin: Path, tmp_path: Path) -> None:
    train(changed(origin), tmp_path / "branch", list_checkpoints(origin)[1])
    ends = [list_checkpoints(run)[-1] for run in (origin, tmp_path / "branch")]
    assert [(ends[0] / name).read_bytes() for name in FILES] == [(ends[1] / name).read_bytes() for name in FILES]
    logs = [timeless(read_log(run / "log.jsonl")) for run in (origin, tmp_path / "branch")]
    assert logs[0] == logs[1]


def test_a_decay_branch_follows_its_own_schedule_and_says_where_it_branched(origin: Path, tmp_path: Path) -> None:
    checkpoint, branch = list_checkpoints(origin)[1], tmp_path / "branch"
    overrides = ["schedule.kind=wsd", "schedule.decay_steps=6", "training.total_steps=14"]
    recipe = changed(origin, *overrides)
    train(recipe, branch, checkpoint)
    steps = [line for line in read_log(branch / "log.jsonl") if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 15))
    assert [line["learning_rate"] for line in steps[8:]] == [learning_rate_at(step, recipe) for step in range(8, 14)]
    assert steps[-1]["learning_rate"] == pytest.approx(0.05 * 0.01)
    assert timeless(steps[:8]) == timeless([s for s in read_log(origin / "log.jsonl") if s["event"] == "step"][:8])
    came_from = read_branching(RunFolder(branch))
    assert came_from is not None
    assert (came_from.checkpoint, came_from.step, came_from.draw) == (str(checkpoint.resolve()), 8, 8)
    assert "schedule.kind: constant -> wsd" in came_from.changed
    # The same command again finds it finished, also when the first run is pruned or gone on.
    shutil.rmtree(checkpoint)
    train(recipe, branch, checkpoint)
    assert find_damage(list_checkpoints(branch)[0]) is None, "the branch's own copy went with the first run's"


def test_a_branch_killed_before_its_first_checkpoint_of_its_own_begins_again(origin: Path, tmp_path: Path) -> None:
    checkpoint, branch = list_checkpoints(origin)[0], tmp_path / "branch"
    train(changed(origin), branch, checkpoint)
    whole = [timeless(read_log(branch / "log.jsonl")), (list_checkpoints(branch)[-1] / FILES[0]).read_bytes()]
    for own in list_checkpoints(branch):
        shutil.rmtree(own)
    train(changed(origin), branch, checkpoint)
    assert [timeless(read_log(branch / "log.jsonl")), (list_checkpoints(branch)[-1] / FILES[0]).read_bytes()] == whole


@pytest.mark.parametrize(
    "change",
    [
        "model.norm_eps=1e-6",
        "data.seed=4",
        "data.packing=best_fit",
        "training.rows_per_step=8",
        "training.precision=fp64",
        "training.seed=1",
        "evaluation.max_tokens=300",
    ],
)
def test_what_would_change_the_meaning_is_refused_by_name(origin: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(UserError, match=change.partition("=")[0]):
        train(changed(origin, change), tmp_path / "branch", list_checkpoints(origin)[1])
    assert not RunFolder(tmp_path / "branch").exists(), "a typo left a run behind"


def test_the_beta1_that_an_average_is_made_with_stays(write_tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    schedule_free = {"optimizer__kind": "schedule_free", "schedule": {"kind": "constant", "warmup_steps": 2}}
    train(read_recipe(str(write_tiny_recipe(**schedule_free, training__total_steps=4))), tmp_path / "origin")
    checkpoint = list_checkpoints(tmp_path / "origin")[-1]
    longer = "training.total_steps=6"
    with pytest.raises(UserError, match=r"optimizer\.beta1: 0\.9 -> 0\.8"):
        train(changed(tmp_path / "origin", longer, "optimizer.beta1=0.8"), tmp_path / "branch", checkpoint)
    train(changed(tmp_path / "origin", longer, "optimizer.beta2=0.9"), tmp_path / "branch", checkpoint)


def test_a_branch_may_pass_over_draws_to_come_and_none_of_the_past(origin: Path, tmp_path: Path) -> None:
    checkpoint = list_checkpoints(origin)[1]
    train(changed(origin, "data.skip_draws=[[8,9]]"), tmp_path / "branch", checkpoint)
    draws = [line["draw"] for line in read_log(tmp_path / "branch" / "log.jsonl") if line["event"] == "step"]
    assert draws == [*range(8), *range(10, 14)]
    with pytest.raises(UserError, match=r"data\.skip_draws"):
        train(changed(origin, "data.skip_draws=[[7,9]]"), tmp_path / "other", checkpoint)


def test_places_that_do_not_fit_are_refused(origin: Path, tmp_path: Path) -> None:
    checkpoint = list_checkpoints(origin)[1]
    with pytest.raises(UserError, match="would end at step 8"):
        train(changed(origin, "training.total_steps=8"), tmp_path / "branch", checkpoint)
    with pytest.raises(UserError, match="is the run that"):
        train(changed(origin), origin, checkpoint)
    with pytest.raises(UserError, match="is not a checkpoint of a run") as raised:
        train(changed(origin), tmp_path / "branch", origin)
    assert str(list_checkpoints(origin)[-1]) in (raised.value.hint or "")
    train(changed(origin), tmp_path / "branch", checkpoint)
    with pytest.raises(UserError, match="was branched from"):
        train(changed(origin), tmp_path / "branch", list_checkpoints(origin)[0])
    progress = checkpoint / "progress.json"
    progress.unlink()  # a link of its own: the branch's stays
    progress.write_text(json.dumps({"step": 8, "draw": 9}))
    with pytest.raises(UserError, match=r"is not whole: .*progress.json"):
        train(changed(origin), tmp_path / "other", checkpoint)
