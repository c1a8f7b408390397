"""Two launches into one run folder: the second is refused by name, whatever is left of the first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mambatrain.errors import UserError
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.runs.folder import RunFolder, read_log

Run = Callable[..., subprocess.CompletedProcess[str]]
HOST = socket.gethostname()


def wait_for_lines(run: Path, lines: int, launcher: subprocess.Popen[bytes]) -> None:
    while len(read_log(run / "log.jsonl")) < lines:
        assert launcher.poll() is None, "the first launch ended"
        time.sleep(0.02)


def test_a_second_launch_is_refused_while_any_worker_of_the_first_lives(
    run_mambatrain: Run, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Its launchers are killed, then rank 0; rank 1, which is stopped, could still write."""
    recipe, run = write_tiny_recipe(training__total_steps=100_000), tmp_path / "run"
    command = ["pretrain", recipe, "--run", run, "--kernels", "torch", "--quiet", "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([Path(sys.executable).with_name("mambatrain"), *command], env=environment)
    killed: list[psutil.Process] = []
    try:
        wait_for_lines(run, 3, first)
        (torchrun,) = psutil.Process(first.pid).children()
        workers = {int(worker.environ()["RANK"]): worker for worker in torchrun.children()}
        killed = [psutil.Process(first.pid), torchrun, *workers.values()]
        first.kill()
        torchrun.kill()
        first.wait()
        wait_for_lines_more(run, 2)  # the workers live on

        second = run_mambatrain(*command, environment={"OMP_NUM_THREADS": "1"})
        assert second.returncode == 1
        refusal = f"error: {run} is in use by another process (pid {workers[0].pid} on {HOST})"
        assert second.stderr.count(refusal) == 1, second.stderr
        assert "Traceback" not in second.stderr

        workers[1].suspend()
        workers[0].kill()
        alone = run_mambatrain(*command[:-2])
        assert alone.returncode == 1
        assert f"error: {run} is in use by another process (pid {workers[1].pid} on {HOST})" in alone.stderr
        assert workers[1].is_running()
    finally:
        for process in killed:
            if process.is_running():
                process.kill()
    step = int(list_checkpoints(run)[-1].name[5:]) if list_checkpoints(run) else 0
    process = subprocess.Popen(
        [Path(sys.executable).with_name("mambatrain"), *command[:-2]], env=environment, stderr=subprocess.PIPE
    )
    wait_for_lines_more(run, 2)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120)[0] is None
    assert process.returncode == 75
    assert int(list_checkpoints(run)[-1].name[5:]) > step


def wait_for_lines_more(run: Path, more: int) -> None:
    """A resumed life cuts the log before it writes."""
    fewest = len(read_log(run / "log.jsonl"))
    deadline = time.monotonic() + 300
    while (now := len(read_log(run / "log.jsonl"))) < fewest + more:
        assert time.monotonic() < deadline, "nobody trains"
        fewest = min(fewest, now)
        time.sleep(0.02)


def test_ranks_share_a_folder_and_who_is_gone_is_not_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), folder.shared(), folder.shared():
        pass
    with folder.locked():
        pass
    said = rf"in use by another process \(pid {os.getpid()} on {HOST}\)"
    with folder.shared(), pytest.raises(UserError, match=said), folder.locked():
        pass
    assert (tmp_path / "run" / ".lock-ranks").read_text().count("pid") == 1, "names of the gone are kept"
