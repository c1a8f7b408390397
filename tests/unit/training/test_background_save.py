"""Checkpoints that are written while training goes on: the same bytes, one at a time, and no failure is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mambatrain.errors import UserError
from mambatrain.recipe import read_recipe
from mambatrain.runs.checkpoint import list_checkpoints, newest_valid_checkpoint
from mambatrain.runs.folder import read_log
from mambatrain.training import saving
from mambatrain.training.assemble import Where
from mambatrain.training.background_save import BackgroundSave
from mambatrain.training.metrics import LiveLine
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

WHERE = Where(device="cpu", kernels="torch", quiet=True)


def test_a_copy_stays_as_it_was_and_its_memory_is_used_again() -> None:
    background = BackgroundSave()
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64)}
    copies = background.copy(tensors)
    tensors["a"].add_(1)
    assert torch.equal(copies["a"], torch.arange(6.0).view(2, 3))
    assert copies["b"].dtype == torch.int64
    addresses = {name: copy.data_ptr() for name, copy in copies.items()}
    again = background.copy(tensors)
    assert {name: copy.data_ptr() for name, copy in again.items()} == addresses
    assert torch.equal(again["a"], tensors["a"])


def test_what_went_wrong_is_raised_where_the_run_can_end_and_once() -> None:
    background = BackgroundSave()

    def write() -> None:
        raise UserError("the disk is full")

    background.start(write)
    background.wait()
    assert background.has_failed
    with pytest.raises(UserError, match="the disk is full"):
        background.finish()
    background.finish()


class SlowSaves:
    """Every save waits until training has logged another line, or waits for the save."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
        self.log, self.main_thread_waits, self.said = run / "log.jsonl", threading.Event(), list[str]()
        self.num_behind_training = 0
        save_checkpoint, wait, say = saving.save_checkpoint, BackgroundSave.wait, LiveLine.say

        def save_late(*arguments: Any, **named: Any) -> Path:
            begun = len(read_log(self.log))
            while len(read_log(self.log)) == begun and not self.main_thread_waits.wait(0.001):
                pass
            self.num_behind_training += len(read_log(self.log)) > begun
            return save_checkpoint(*arguments, **named)

        def wait_openly(background: BackgroundSave) -> None:
            self.main_thread_waits.set()
            wait(background)
            self.main_thread_waits.clear()

        def say_and_note(line: LiveLine, text: str) -> None:
            self.said.append(text)
            say(line, text)

        monkeypatch.setattr(saving, "save_checkpoint", save_late)
        monkeypatch.setattr(BackgroundSave, "wait", wait_openly)
        monkeypatch.setattr(LiveLine, "say", say_and_note)


@pytest.mark.parametrize("kind", ["adamw", "schedule_free"])
def test_slow_saves_write_the_bytes_of_saves_that_are_waited_for(
    kind: str, monkeypatch: pytest.MonkeyPatch, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    changes = {"checkpoint__every_steps": 3, "checkpoint__keep_newest": 9, "optimizer__kind": kind}
    changes |= {"schedule": {"kind": "constant"}} if kind == "schedule_free" else {}
    for name, asynchronous in (("waited", False), ("slow", True)):
        with monkeypatch.context() as patch:
            slow = SlowSaves(patch, tmp_path / name) if asynchronous else None
            recipe = read_recipe(str(write_tiny_recipe(**changes, checkpoint__asynchronous=asynchronous)))
            assert run_training(recipe, tmp_path / name, WHERE, "if-possible", StopRequest()) == 0
    assert slow is not None
    assert slow.num_behind_training > 2
    assert contents(tmp_path / "slow") == contents(tmp_path / "waited")


def contents(run: Path) -> dict[str, bytes]:
    return {
        f"{folder.name}/{file.name}": file.read_bytes() for folder in list_checkpoints(run) for file in folder.iterdir()
    }


def test_a_save_that_is_due_waits_for_the_one_before_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    slow = SlowSaves(monkeypatch, tmp_path / "run")
    slow.log = tmp_path / "none"  # no line will come: each save ends when it is waited for
    recipe = read_recipe(str(write_tiny_recipe(checkpoint__every_steps=1, checkpoint__asynchronous=True)))
    assert run_training(recipe, tmp_path / "run", WHERE, "if-possible", StopRequest()) == 0
    assert sum("still being written" in text for text in slow.said) == 1
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")][-1] == "step-00000012"


def test_a_run_whose_save_failed_ends_with_the_next_draw(
    monkeypatch: pytest.MonkeyPatch, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    save_checkpoint, start = saving.save_checkpoint, BackgroundSave.start

    def fill_the_disk(checkpoints: Path, progress: Any, *rest: Any, **named: Any) -> Path:
        if progress.step == 8:
            raise UserError("the disk is full: a checkpoint was not written")
        return save_checkpoint(checkpoints, progress, *rest, **named)

    def start_and_wait(background: BackgroundSave, write: Callable[[], None]) -> None:
        start(background, write)
        background.wait()

    monkeypatch.setattr(saving, "save_checkpoint", fill_the_disk)
    monkeypatch.setattr(BackgroundSave, "start", start_and_wait)
    run = tmp_path / "run"
    recipe = read_recipe(str(write_tiny_recipe(checkpoint__keep_best=False, checkpoint__asynchronous=True)))
    with pytest.raises(UserError, match="the disk is full"):
        run_training(recipe, run, WHERE, "if-possible", StopRequest())
    assert read_log(run / "log.jsonl")[-1]["step"] == 9
    assert str(newest_valid_checkpoint(run)).endswith("step-00000004")


def test_an_error_waits_for_the_checkpoint_that_is_being_written(
    monkeypatch: pytest.MonkeyPatch, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    SlowSaves(monkeypatch, tmp_path / "run").log = tmp_path / "none"

    def fail_at_five(run: Any, draw: Any, *_: Any) -> None:
        if run.progress.step == 5:
            raise RuntimeError("a bug")

    monkeypatch.setattr("mambatrain.training.loop.write_draw", fail_at_five)
    recipe = read_recipe(str(write_tiny_recipe(checkpoint__keep_best=False, checkpoint__asynchronous=True)))
    with pytest.raises(RuntimeError, match="a bug"):
        run_training(recipe, tmp_path / "run", WHERE, "if-possible", StopRequest())
    assert str(newest_valid_checkpoint(tmp_path / "run")).endswith("step-00000004")
