"""A clock that is set forth and back by hours while a run trains changes nothing of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambatrain.recipe import read_recipe
from mambatrain.runs.checkpoint import find_damage, list_checkpoints
from mambatrain.runs.folder import RunFolder, read_log
from mambatrain.training.assemble import Where
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

WHERE = Where(device="cpu", kernels="torch")
OF_A_CLOCK = {"seconds", "data_seconds", "tokens_per_second", "model_flops_utilisation", "memory_bytes"}
HOURS = 3600.0


def outcome(run: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, bytes]]]:
    log = [{key: line[key] for key in line.keys() - OF_A_CLOCK} for line in read_log(run / "log.jsonl")]
    return log, {
        folder.name: {file.name: file.read_bytes() for file in folder.iterdir()} for folder in list_checkpoints(run)
    }


def test_a_clock_that_jumps_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = read_recipe(str(write_tiny_recipe(checkpoint__every_steps=2, checkpoint__asynchronous=True)))
    assert run_training(recipe, tmp_path / "whole", WHERE, "if-possible", StopRequest()) == 0
    true_time, jumps = time.time, itertools.cycle([0.0, 9 * HOURS, -9 * HOURS, 5000 * HOURS])
    asked = 0

    def jumping() -> float:
        nonlocal asked
        asked += 1
        return true_time() + next(jumps)

    run, began = RunFolder(tmp_path / "run"), time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        patch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
        patch.setattr("sys.stderr", StampedStream())
        assert run_training(recipe, run.path, WHERE, "if-possible", stop_at_once := StopRequest()) == 0
        assert not stop_at_once.asked
        assert not run.is_running()
        with run.locked():
            assert run.is_running()
        assert [find_damage(checkpoint) for checkpoint in list_checkpoints(run.path)] == [None, None]
    assert asked, "nobody was told another time"
    lasted = time.monotonic() - began
    seconds = [line["seconds"] for line in read_log(run.log_file) if line["event"] == "step"]
    assert all(second > 0.0 for second in seconds)
    assert sum(seconds) < lasted
    assert outcome(run.path) == outcome(tmp_path / "whole")


class StampedStream:
    """A stderr that asks what time it is at every write, so that the clock that jumps is known to be in place."""

    def write(self, text: str) -> int:
        time.time()
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False
