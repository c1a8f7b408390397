"""A rank that hangs or dies: the others end, the message names it, and the same command goes on."""

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
from launches import launch

from mambatrain.launch import describe_failures
from mambatrain.runs.checkpoint import find_damage, list_checkpoints
from mambatrain.runs.folder import read_log

LIMIT = 20  # seconds; ample for a step of this model on any machine
FILES = ("model.safetensors", "optimizer.safetensors", "progress.json")
WriteRecipe = Callable[..., Path]


def begin(recipe: Path, run: Path, *options: str) -> subprocess.Popen[str]:
    """Two processes by the command, as a user starts them."""
    command = [Path(sys.executable).with_name("mambatrain"), "pretrain", recipe, "--run", run, "--kernels", "torch"]
    return subprocess.Popen(
        [*command, "--processes", "2", "--rank-timeout", str(LIMIT), *options],
        # torchrun would give a process that is stopped half a minute to answer SIGTERM
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers_by_rank(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    (torchrun,) = psutil.Process(launcher.pid).children()
    return {int(worker.environ()["RANK"]): worker for worker in torchrun.children()}


def wait_for_lines(run: Path, lines: int, launcher: subprocess.Popen[str]) -> None:
    while len(read_log(run / "log.jsonl")) < lines:
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.02)


def strike(recipe: Path, run: Path, number: signal.Signals, lines: int) -> tuple[int, int, str]:
    """Begins or resumes, and sends rank 1 a signal when the log has so many lines: pid, exit code, what was said."""
    launcher = begin(recipe, run)
    workers: dict[int, psutil.Process] = {}
    try:
        wait_for_lines(run, lines, launcher)
        workers = workers_by_rank(launcher)
        workers[1].send_signal(number)
        _, stderr = launcher.communicate(timeout=300)
    finally:
        launcher.kill()
        for worker in workers.values():
            if worker.is_running():
                worker.kill()
    left = list_checkpoints(run)
    assert left
    assert [find_damage(checkpoint) for checkpoint in left] == [None] * len(left)
    assert "Traceback" not in stderr
    return workers[1].pid, launcher.returncode, stderr


def test_a_rank_that_hangs_or_dies_is_named_and_the_run_goes_on_as_if_nothing_had_been(
    write_tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_tiny_recipe(training__total_steps=40, checkpoint__every_steps=5, evaluation__every_steps=10)
    run, undisturbed, host = tmp_path / "run", tmp_path / "undisturbed", socket.gethostname()

    pid, exit_code, stderr = strike(recipe, run, signal.SIGSTOP, lines=9)
    assert exit_code == 1, stderr
    assert f"error: no process has moved for {LIMIT} seconds; the others wait for\n" in stderr
    assert f"  process 1 of 2 on {host} (pid {pid}): " in stderr
    assert "gives no sign of life" in stderr
    assert "process 0 of 2" not in stderr
    assert "a larger --rank-timeout" in stderr
    assert not psutil.pid_exists(pid)

    _, exit_code, stderr = strike(recipe, run, signal.SIGKILL, lines=23)
    assert exit_code == 1, stderr
    assert f"error: process 1 on {host} was killed by SIGKILL; the others were stopped" in stderr
    assert "no process has moved" not in stderr
    assert len(read_log(run / "log.jsonl")) < 40, "the run ended too early"

    launch(
        2, [{"recipe": str(recipe), "run": str(one), "resume": "if-possible"} for one in (run, undisturbed)], tmp_path
    )
    ends = [list_checkpoints(folder)[-1] for folder in (run, undisturbed)]
    assert [end.name for end in ends] == ["step-00000040"] * 2
    assert all((ends[0] / name).read_bytes() == (ends[1] / name).read_bytes() for name in FILES)


def test_a_rank_that_waits_in_vain_for_the_others_to_come_says_so(
    run_mambatrain: Callable[..., subprocess.CompletedProcess[str]], write_tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    group = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = ["pretrain", write_tiny_recipe(), "--run", tmp_path / "run", "--device", "cpu", "--rank-timeout", "2"]
    done = run_mambatrain(*command, environment=group)
    assert done.returncode == 1
    assert "error: process 0 of 2 waited 2 seconds for the others to come: " in done.stderr
    assert "a larger --rank-timeout" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "recipe.yaml").exists(), "a run was left behind"


@pytest.mark.parametrize(
    ("exit_codes", "said"),
    [
        ({1: -9, 0: 76}, "process 1 on {host} was killed by SIGKILL"),
        ({0: 1, 1: -15}, "process 0 on {host} ended with exit code 1"),
        ({0: 76, 2: 76}, ""),
        ({0: 76, 1: -15}, "process 1 on {host} was killed by SIGTERM"),
        ({3: -11, 1: -9}, "process 1 on {host} was killed by SIGKILL, process 3 on {host} was killed by SIGSEGV"),
    ],
)
def test_the_launcher_names_who_failed_and_not_who_waited(exit_codes: dict[int, int], said: str) -> None:
    assert describe_failures(exit_codes) == said.format(host=socket.gethostname())


def test_a_node_that_no_other_meets_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "mambatrain.launch", "--nnodes=2", "--nproc-per-node=1"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=join_timeout=1"]
    done = subprocess.run(
        [*command, *meeting, "-m", "mambatrain", "--version"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: the nodes did not meet: RendezvousTimeoutError\n\nhint: every node runs the same" in done.stderr
    assert "Traceback" not in done.stderr
