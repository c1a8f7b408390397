"""A disk that takes no more while a checkpoint is written: a sentence, and the same command continues."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mambatrain.recipe import read_recipe
from mambatrain.runs.checkpoint import list_checkpoints, newest_valid_checkpoint
from mambatrain.training.assemble import Where
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

LARGEST_FILE_BYTES = 60_000  # room for model.safetensors and the log, none for optimizer.safetensors


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_on_a_full_disk_ends_with_a_sentence_and_goes_on(
    asynchronous: bool, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, run = write_tiny_recipe(checkpoint__asynchronous=asynchronous), tmp_path / "run"
    asked = StopRequest()
    asked.asked = True
    where = Where(device="cpu", kernels="torch", quiet=True)
    assert run_training(read_recipe(str(recipe)), run, where, "if-possible", asked) == 75
    earlier = newest_valid_checkpoint(run)
    command = [Path(sys.executable).with_name("mambatrain"), "pretrain", recipe, "--run", run]
    done = subprocess.run(
        [*command, "--kernels", "torch", "--device", "cpu"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE_BYTES, LARGEST_FILE_BYTES)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "error: the disk is full: checkpoint " in done.stderr
    assert "the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert list_checkpoints(run) == [earlier]
    assert newest_valid_checkpoint(run) == earlier
    assert run_training(read_recipe(str(recipe)), run, where, "required", StopRequest()) == 0
    assert list_checkpoints(run)[-1].name == "step-00000012"
