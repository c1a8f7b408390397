"""The batch script, run by bash with stand-ins for SLURM's commands that do what they stand for on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mambatrain.runs.folder import read_log

Run = Callable[..., subprocess.CompletedProcess[str]]
STAND_INS = {
    "srun": 'shift; exec "$@"',  # the first word is srun's own option; a signal to srun reaches its task
    "scontrol": 'if [ "$1" = show ]; then echo localhost; echo other; else echo "$@" > requeued; fi',
}


@pytest.fixture
def job(run_mambatrain: Run, write_tiny_recipe: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """Prints the script of a long run and puts the stand-ins where it finds them."""
    recipe = write_tiny_recipe(training__total_steps=100_000, checkpoint__every_steps=50_000)
    for name, content in STAND_INS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{content}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def write(run: str) -> Path:
        done = run_mambatrain(
            "slurm", recipe, "--processes", "1", "--run", run, "--time", "1:00:00", "--sbatch=--partition=cpu",
            "--set", "optimizer.learning_rate=2e-3",
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        (tmp_path / "job.sh").write_text(done.stdout)
        return tmp_path / "job.sh"

    return write


def begin(script: Path, run: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PATH": f"{script.parent / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        ["bash", script], cwd=script.parent, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not any(line["event"] == "step" for line in read_log(run / "log.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    return process


def test_told_before_its_time_is_over_a_job_saves_and_queues_itself_again(
    job: Callable[[str], Path], tmp_path: Path
) -> None:
    script, run = job("my run"), tmp_path / "my run"
    assert {"#SBATCH --signal=B:USR1@300", "#SBATCH --partition=cpu", "#SBATCH --requeue"} <= set(
        script.read_text().splitlines()
    )
    process = begin(script, run)
    process.send_signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B: says
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 75, stderr
    assert (run / "stopped").is_file()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_job_that_is_cancelled_saves_and_is_not_queued_again(job: Callable[[str], Path], tmp_path: Path) -> None:
    script, run = job("run"), tmp_path / "run"
    process = begin(script, run)
    step = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(step[0]), signal.SIGTERM)  # what scancel sends the tasks
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 75, stderr
    assert (run / "stopped").is_file()
    assert not (tmp_path / "requeued").exists()


def test_several_nodes_meet_at_the_first_and_what_does_not_divide_is_refused(
    run_mambatrain: Run, write_tiny_recipe: Callable[..., Path]
) -> None:
    recipe = write_tiny_recipe(training__rows_per_step=64)
    done = run_mambatrain("slurm", recipe, "--nodes", "4", "--shard", "node")
    assert "#SBATCH --nodes=4" in done.stdout
    assert "#SBATCH --gpus-per-node=8" in done.stdout
    assert '--gpus 8 --shard node --nodes 4 --rendezvous "$host:$port"' in done.stdout
    shared = run_mambatrain("slurm", recipe, "--nodes", "16", "--sequence", "4")  # 128 processes, 4 to a row
    assert "--gpus 8 --sequence 4 --nodes 16" in shared.stdout
    refused = run_mambatrain("slurm", recipe, "--nodes", "3")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "64 rows a step do not divide into 3 x 8 processes" in refused.stderr
    refused = run_mambatrain("slurm", recipe, "--nodes", "4", "--shard", "3")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "--shard 3: 32 processes do not divide into groups of 3" in refused.stderr


def test_odd_characters_in_names_reach_the_run_as_they_are(
    run_mambatrain: Run, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_tiny_recipe().rename(tmp_path / "it's $HOME; `no`.yaml")
    run = 'run\'s "$(x)" #1'
    done = run_mambatrain("slurm", recipe, "--processes", "1", "--run", run, "--set", "data.seed=4")
    assert "#SBATCH --job-name=mambatrain-it-s-HOME-no-\n" in done.stdout
    script = done.stdout.replace("srun --kill-on-bad-exit=1 mambatrain", "printf '%s\\n'")
    shown = subprocess.run(["bash", "-c", script + "\n"], capture_output=True, text=True, check=False, env=os.environ)
    assert shown.stdout.splitlines()[:4] == ["pretrain", str(recipe), "--run", run]
