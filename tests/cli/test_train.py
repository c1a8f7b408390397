"""`pretrain` and `finetune` as a person runs them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mambatrain.runs.checkpoint import find_damage, list_checkpoints
from mambatrain.runs.folder import read_log

Run = Callable[..., subprocess.CompletedProcess[str]]
WriteRecipe = Callable[..., Path]


def start(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    command = [Path(sys.executable).with_name("mambatrain"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(run: Path, step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_log(run / "log.jsonl")):
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} did not reach step {step}")


def test_pretrain_leaves_a_run_and_finetune_goes_on_from_it(
    run_mambatrain: Run, write_tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, run = write_tiny_recipe(), tmp_path / "run"
    done = run_mambatrain(
        "pretrain", recipe, "--run", run, "--kernels", "torch", "--set", "optimizer.learning_rate=5e-3"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "torch: asked for" in done.stderr
    assert {"recipe.yaml", "run.json", "log.jsonl", "loss.png", "tokenizer.json", "checkpoints"} <= {
        path.name for path in run.iterdir()
    }
    facts = json.loads((run / "run.json").read_text())
    assert facts["kernels"]["backend"] == "torch"
    assert facts["kernels"]["self_check"]["passed"] is True
    log = read_log(run / "log.jsonl")
    assert [line["step"] for line in log if line["event"] == "step"] == list(range(1, 13))
    assert [line["step"] for line in log if line["event"] == "held_out"] == [0, 5, 10, 12]

    again = run_mambatrain("pretrain", recipe, "--run", run, "--set", "optimizer.learning_rate=5e-3")
    assert again.returncode == 0
    assert "is finished: 12 steps are done" in again.stderr

    continued = run_mambatrain(
        "finetune", write_tiny_recipe(model=None), "--from", run, "--run", tmp_path / "continued", "--set",
        "optimizer.learning_rate=1e-4",
    )  # fmt: skip
    assert continued.returncode == 0, continued.stderr
    first = next(line for line in read_log(tmp_path / "continued" / "log.jsonl") if line["event"] == "held_out")
    last = [line for line in log if line["event"] == "held_out"][-1]
    assert first["held_out_loss"] == pytest.approx(last["held_out_loss"], rel=1e-6)


def test_another_recipe_in_the_same_folder_is_refused_with_what_differs(
    run_mambatrain: Run, write_tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, run = write_tiny_recipe(training__total_steps=2), tmp_path / "run"
    assert run_mambatrain("pretrain", recipe, "--run", run).returncode == 0
    other = run_mambatrain("pretrain", recipe, "--run", run, "--set", "optimizer.learning_rate=0.5")
    assert other.returncode == 1
    assert "optimizer.learning_rate: 0.01 -> 0.5" in other.stderr
    assert "hint: " in other.stderr
    assert "Traceback" not in other.stderr
    fresh = run_mambatrain("pretrain", recipe, "--run", run, "--set", "optimizer.learning_rate=0.5", "--fresh")
    assert fresh.returncode == 0, fresh.stderr
    assert list_checkpoints(run / "before-1"), "the earlier run was not kept"


def test_a_branch_takes_its_recipe_from_the_run_it_leaves(
    run_mambatrain: Run, write_tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, run, branch = write_tiny_recipe(), tmp_path / "run", tmp_path / "branch"
    assert run_mambatrain("pretrain", recipe, "--run", run, "--kernels", "torch").returncode == 0
    checkpoint = list_checkpoints(run)[0]
    options = ["--branch-from", checkpoint, "--kernels", "torch", "--set", "schedule.kind=linear"]
    assert "a folder of its own" in run_mambatrain("pretrain", *options).stderr
    assert "a folder of its own" in run_mambatrain("pretrain", recipe, "--run", branch, *options).stderr
    refused = run_mambatrain("pretrain", "--run", branch, *options, "--set", "data.seed=9")
    assert (refused.returncode, "data.seed: 3 -> 9" in refused.stderr) == (1, True), refused.stderr
    done = run_mambatrain("pretrain", "--run", branch, *options, "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads((branch / "branched_from.json").read_text())["changed"] == ["schedule.kind: cosine -> linear"]
    assert read_log(branch / "log.jsonl")[-1]["step"] == 12
    shown = run_mambatrain("runs", "show", branch).stdout
    step = int(checkpoint.name[5:])
    assert f"branched     at step {step} from {checkpoint}\n  schedule.kind: cosine -> linear" in shown


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_says_75_and_goes_on(
    write_tiny_recipe: WriteRecipe, tmp_path: Path, processes: int, number: signal.Signals
) -> None:
    if (processes, number) == (2, signal.SIGINT):
        pytest.skip("the launcher hands both signals on in one place; starting processes is what costs time")
    recipe, run = write_tiny_recipe(training__total_steps=100_000, checkpoint__every_steps=50_000), tmp_path / "run"
    options = ["--processes", "2"] if processes == 2 else []
    process = start("pretrain", recipe, "--run", run, "--kernels", "torch", *options, cwd=tmp_path)
    wait_for_step(run, 3)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr
    # The newest: an evaluation that came between may have left a best one.
    assert int(list_checkpoints(run)[-1].name[5:]) == max(line["step"] for line in read_log(run / "log.jsonl"))
    assert (run / "stopped").is_file()


@pytest.mark.parametrize("processes", [1, 2])
def test_asked_twice_it_leaves_at_once_with_what_there_was(
    write_tiny_recipe: WriteRecipe, tmp_path: Path, processes: int
) -> None:
    """Both signals are there before a handler can run: no step is short enough to end between them."""
    recipe, run = write_tiny_recipe(training__total_steps=100_000, checkpoint__every_steps=10), tmp_path / "run"
    options = ["--processes", "2"] if processes == 2 else []
    process = start("pretrain", recipe, "--run", run, "--kernels", "torch", *options, cwd=tmp_path)
    try:
        wait_for_step(run, 11)
        for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
            process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not (run / "stopped").exists()
    left = list_checkpoints(run)
    assert left
    assert [find_damage(checkpoint) for checkpoint in left] == [None] * len(left)


def test_a_folder_in_use_is_refused(run_mambatrain: Run, write_tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, run = write_tiny_recipe(training__total_steps=100_000), tmp_path / "run"
    first = start("pretrain", recipe, "--run", run, "--quiet", cwd=tmp_path)
    try:
        wait_for_step(run, 1)
        second = run_mambatrain("pretrain", recipe, "--run", run)
        assert second.returncode == 1
        assert f"in use by another process (pid {first.pid} on {socket.gethostname()})" in second.stderr
    finally:
        first.kill()
        first.communicate()


@pytest.mark.parametrize(
    ("change", "said", "hinted"),
    [
        (
            "model.vocab_size=256",
            "was tokenized with 512 token ids but model.vocab_size is 256",
            "model.vocab_size=512",
        ),
        ("data.shards=nowhere", "nowhere", "hint: "),
        ("model.d_modle=3", "no such setting", "model.d_model"),
        ("training.total_steps=many", "training.total_steps", "hint: "),
        ("training.total_steps", "not of the form path.to.field=value", "hint: "),
    ],
)
def test_a_mistake_gets_a_sentence_and_a_hint(
    run_mambatrain: Run, write_tiny_recipe: WriteRecipe, tmp_path: Path, change: str, said: str, hinted: str
) -> None:
    done = run_mambatrain("pretrain", write_tiny_recipe(), "--run", tmp_path / "run", "--set", change)
    assert done.returncode == 1
    assert said in done.stderr
    assert hinted in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_rows_that_do_not_divide_into_processes_are_refused_once(
    run_mambatrain: Run, write_tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_tiny_recipe(training__rows_per_step=3)
    done = run_mambatrain("pretrain", recipe, "--run", tmp_path / "run", "--processes", "2")
    assert done.returncode == 1
    assert done.stderr.count("3 rows a step do not divide into 2 processes") == 1
    assert "Traceback" not in done.stderr
    done = run_mambatrain("pretrain", recipe, "--run", tmp_path / "run", "--sequence", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--sequence 2: 1 process(es) do not divide into groups of 2" in done.stderr
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        (("--processes", "2", "--device", "cuda"), {}, "--processes 2 and --device cuda exclude each other"),
        (("--gpus", "2", "--device", "cpu"), {}, "--gpus 2 and --device cpu exclude each other"),
        (("--processes", "1", "--nodes", "2", "--rendezvous", "a:b"), {}, "--rendezvous a:b is not HOST:PORT"),
        (("--processes", "2"), {"RANK": "0", "LOCAL_WORLD_SIZE": "4"}, "2 processes are asked for, and the launcher"),
    ],
)
def test_what_contradicts_itself_is_refused_and_not_chosen_from(
    run_mambatrain: Run, write_tiny_recipe: WriteRecipe, options: tuple[str, ...], environment: Any, said: str
) -> None:
    done = run_mambatrain("pretrain", write_tiny_recipe(), "--run", "run", *options, environment=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"error: {said}" in done.stderr


def test_a_signal_before_a_process_has_begun_ends_the_command_and_is_said(
    write_tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    command = [Path(sys.executable).with_name("mambatrain"), "pretrain", write_tiny_recipe(), "--processes", "2"]
    launcher = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (started := psutil.Process(launcher.pid).children()):
        assert launcher.poll() is None
        time.sleep(0.001)
    started[0].suspend()  # it imports for a second before it starts the processes
    launcher.send_signal(signal.SIGTERM)
    started[0].resume()
    _, stderr = launcher.communicate(timeout=300)
    assert (launcher.returncode, stderr) == (130, "left while no process of the run was there\nstopped\n")
    assert not (tmp_path / "runs").exists()


def test_wandb_without_a_key_is_offline_and_says_where(
    run_mambatrain: Run, write_tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_tiny_recipe(training__total_steps=2)
    done = run_mambatrain("pretrain", recipe, "--run", tmp_path / "run", "--tracker", "wandb")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert "offline-run-" in done.stderr
