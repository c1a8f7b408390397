"""Killed at any instant and resumed equals never killed, to the last bit."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mambatrain.recipe import read_recipe
from mambatrain.runs.checkpoint import list_checkpoints, read_progress, save_checkpoint
from mambatrain.runs.folder import read_log
from mambatrain.training.assemble import Where
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

TIMES_AND_RATES = {"seconds", "data_seconds", "tokens_per_second", "model_flops_utilisation", "memory_bytes"}


def run_lives(
    recipe: Path, run: Path, seed: int, kills: int, kernels: str, weights: Path | None = None
) -> list[dict[str, Any]]:
    arguments = [recipe, run, str(seed), str(kills), kernels, *([weights] if weights else [])]
    command = [sys.executable, Path(__file__).with_name("lives.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    lives: list[dict[str, Any]] = json.loads(done.stdout)
    return lives


def outcome(run: Path) -> tuple[dict[str, dict[str, bytes]], list[dict[str, Any]]]:
    """Every byte of every checkpoint, and the log without what a clock says."""
    checkpoints = {
        folder.name: {file.name: file.read_bytes() for file in folder.iterdir()} for folder in list_checkpoints(run)
    }
    log = [
        {key: value for key, value in line.items() if key not in TIMES_AND_RATES}
        for line in read_log(run / "log.jsonl")
    ]
    return checkpoints, log


@pytest.mark.parametrize(
    ("block", "kernels", "kills"), [("mamba1", "auto", 20), ("mamba1", "torch", 6), ("mamba2", "auto", 20)]
)
def test_kills_change_nothing(
    block: str, kernels: str, kills: int, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_tiny_recipe(
        model__block=block,
        **({"model__head_dim": 16} if block == "mamba2" else {}),
        training__total_steps=60,
        training__micro_batch_rows=2,
        checkpoint__every_steps=3,
        evaluation__every_steps=7,
    )
    undisturbed = run_lives(recipe, tmp_path / "undisturbed", 0, 0, kernels)
    lives = run_lives(recipe, tmp_path / "killed", 11, kills, kernels)
    assert [life["signal"] for life in undisturbed] == [0]
    assert len({life["checkpoint"] for life in lives if life["signal"] == 9}) > kills // 5, "the run ended too early"
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")


def test_kills_beside_a_background_save_change_nothing(write_tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Against a run that waited for its saves: the same bytes in every checkpoint."""
    changes = {"training__total_steps": 60, "checkpoint__every_steps": 3, "evaluation__every_steps": 7}
    changes |= {"training__micro_batch_rows": 2, "model__head_dim": 16, "model__block": "mamba2"}
    waiting = write_tiny_recipe(**changes, checkpoint__asynchronous=False)
    beside = write_tiny_recipe(**changes, checkpoint__asynchronous=True)
    run_lives(waiting, tmp_path / "undisturbed", 0, 0, "auto")
    lives = run_lives(beside, tmp_path / "killed", 11, 20, "auto")
    assert sum(life["trained_on"] for life in lives) > 3, "no life died while it trained and saved"
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")


def test_kills_change_nothing_of_states_that_rows_go_on_from(
    write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """They are part of each checkpoint; draws that are passed over leave a gap in them."""
    recipe = write_tiny_recipe(
        data__carry_state=True,
        data__skip_draws=[[4, 5], [9, 11]],
        training__total_steps=20,
        training__micro_batch_rows=2,
        checkpoint__every_steps=3,
        checkpoint__asynchronous=True,
        evaluation__every_steps=7,
    )
    run_lives(recipe, tmp_path / "undisturbed", 0, 0, "auto")
    lives = run_lives(recipe, tmp_path / "killed", 3, 5, "auto")
    assert {life["signal"] for life in lives[:-1]} == {9}
    assert len({life["checkpoint"] for life in lives}) > 2, "the kills fell on nothing"
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")
    carried = load_file(list_checkpoints(tmp_path / "killed")[-1] / "extra.safetensors")
    assert any(bool(tensor.any()) for tensor in carried.values())


@pytest.mark.parametrize(
    ("block", "kernels", "adapter"),
    [
        ("mamba1", "auto", {"targets": ["in_proj", "x_proj", "dt_proj", "out_proj", "embedding"], "tune": ["A_log"]}),
        ("mamba2", "auto", {"kind": "state", "window": True}),
    ],
)
def test_kills_change_nothing_of_an_adapter(
    block: str, kernels: str, adapter: dict[str, Any], write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    own = {"model__head_dim": 16} if block == "mamba2" else {}
    base = read_recipe(str(write_tiny_recipe(model__block=block, **own, training__total_steps=2)))
    run_training(base, tmp_path / "base", Where("cpu", kernels, quiet=True), "if-possible", StopRequest())
    recipe = write_tiny_recipe(
        model=None, adapter=adapter, training__total_steps=30, checkpoint__every_steps=2, evaluation__every_steps=7
    )
    run_lives(recipe, tmp_path / "undisturbed", 0, 0, kernels, tmp_path / "base")
    lives = run_lives(recipe, tmp_path / "killed", 5, 5, kernels, tmp_path / "base")
    assert {life["signal"] for life in lives[:-1]} == {9}
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")


def test_kills_change_nothing_of_a_run_on_conversations(write_tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Killed while it makes tokens of them, too; their rows of new tokens are made again in each life."""
    base = read_recipe(str(write_tiny_recipe(training__total_steps=2)))
    run_training(base, tmp_path / "base", Where("cpu", "auto", quiet=True), "if-possible", StopRequest())
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {a} {b}", "completion": f"{b} {a}"}) + "\n" for a in words for b in words)
    )
    chats = {"files": [str(tmp_path / "chats.jsonl")], "template": "chatml", "held_out": 0.2}
    recipe = write_tiny_recipe(
        model=None,
        data__shards=None,
        data__chats=chats | {"new_tokens": ["<|im_start|>", "<|im_end|>"]},
        data__row_tokens=64,
        training__total_steps=16,
        checkpoint__every_steps=2,
        evaluation__every_steps=6,
    )
    run_lives(recipe, tmp_path / "undisturbed", 0, 0, "auto", tmp_path / "base")
    lives = run_lives(recipe, tmp_path / "killed", 7, 4, "auto", tmp_path / "base")
    assert {life["signal"] for life in lives[:-1]} == {9}
    assert len({life["checkpoint"] for life in lives}) > 2, "the kills fell on nothing"
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")
    kept = [{file.name: file.read_bytes() for file in (tmp_path / run / "chats").iterdir() if file.suffix != ".json"}
            for run in ("killed", "undisturbed")]  # fmt: skip
    assert kept[0] == kept[1] and "train.counted.npy" in kept[0]


def test_kills_change_nothing_of_learning_from_preferences(
    write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Lives that end in the pass of the reference, too: nothing of it is kept, and the next one makes it."""
    base = read_recipe(str(write_tiny_recipe(training__total_steps=2)))
    run_training(base, tmp_path / "base", Where("cpu", "auto", quiet=True), "if-possible", StopRequest())
    pairs = [{"prompt": f"say {n}", "chosen": f"yes, {n}", "rejected": f"no, not {n}"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    chats = {"files": [str(tmp_path / "pairs.jsonl")], "format": "preference", "held_out": 0.1}
    recipe = write_tiny_recipe(
        model=None,
        data={"chats": chats, "row_tokens": 80},
        preferences={},
        training__total_steps=30,
        training__micro_batch_rows=2,
        checkpoint__every_steps=2,
        evaluation__every_steps=7,
    )
    run_lives(recipe, tmp_path / "undisturbed", 0, 0, "auto", tmp_path / "base")
    lives = run_lives(recipe, tmp_path / "killed", 4, 6, "auto", tmp_path / "base")
    assert {life["signal"] for life in lives[:-1]} == {9}
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")


def test_a_life_that_ended_between_a_save_and_its_pruning_leaves_nothing_for_good(
    monkeypatch: pytest.MonkeyPatch, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Killed behind the very last save, too: no later save comes that would prune."""
    recipe = read_recipe(str(write_tiny_recipe(checkpoint__every_steps=1, checkpoint__keep_newest=2)))
    where = Where(device="cpu", kernels="torch", quiet=True)
    run_training(recipe, tmp_path / "whole", where, "if-possible", StopRequest())
    with monkeypatch.context() as patch:
        patch.setattr("mambatrain.training.saving.prune_checkpoints", lambda *_: None)
        run_training(recipe, tmp_path / "killed", where, "if-possible", StopRequest())
    assert len(list_checkpoints(tmp_path / "killed")) == recipe.total_steps
    run_training(recipe, tmp_path / "killed", where, "if-possible", StopRequest())
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_life_that_ended_within_its_first_file_does_not_block_the_folder(
    monkeypatch: pytest.MonkeyPatch, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = read_recipe(str(write_tiny_recipe(training__total_steps=1)))
    where, run = Where(device="cpu", kernels="torch", quiet=True), tmp_path / "run"

    def stopped_short(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", stopped_short)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # what is killed cleans nothing up
        run_training(recipe, run, where, "if-possible", StopRequest())
    assert sorted(file.name for file in run.iterdir()) == [".lock", ".recipe.yaml.partial"]
    assert run_training(recipe, run, where, "if-possible", StopRequest()) == 0


def test_a_life_that_ended_while_a_checkpoint_replaced_another_of_its_step_lost_neither(
    monkeypatch: pytest.MonkeyPatch, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """As when an evaluation that was cut short is made up for: here the one checkpoint that there is."""
    recipe = read_recipe(str(write_tiny_recipe(training__total_steps=2, checkpoint__keep_newest=1)))
    where, run = Where(device="cpu", kernels="torch", quiet=True), tmp_path / "run"
    run_training(recipe, run, where, "if-possible", StopRequest())
    before, (only,) = outcome(run), list_checkpoints(run)
    tensors, progress = load_file(only / "model.safetensors"), read_progress(only)
    replace = Path.replace

    def killed_in_between(self: Path, target: Path) -> Path:
        if Path(target) == only:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed_in_between)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # what is killed cleans nothing up
        save_checkpoint(run / "checkpoints", progress, tensors, {})
    assert list_checkpoints(run) == []
    assert run_training(recipe, run, where, "required", StopRequest()) == 0
    assert outcome(run) == before
