"""What a run folder tells from outside."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mambatrain.errors import UserError
from mambatrain.recipe import read_recipe, write_recipe
from mambatrain.runs import folder
from mambatrain.runs.branch import read_branching
from mambatrain.runs.checkpoint import Progress, damages_of, save_checkpoint
from mambatrain.runs.folder import RunFolder, read_log, read_log_end
from mambatrain.runs.overview import find_runs, open_run, summarise_run

HOLD = """
import sys
from pathlib import Path
from mambatrain.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(write_tiny_recipe: Callable[..., Path], tmp_path: Path) -> RunFolder:
    """A run of 12 steps that has done 4, evaluated at 0."""
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.path.mkdir(parents=True)
    folder.recipe_file.write_text(write_recipe(read_recipe(str(write_tiny_recipe()))))
    lines = [{"event": "held_out", "step": 0, "held_out_bits_per_byte": 3.5}]
    lines += [{"event": "step", "step": step, "tokens_seen": 128 * step, "loss": 6.0} for step in range(1, 5)]
    folder.log_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    save(folder, 4)
    return folder


def save(run: RunFolder, step: int) -> Path:
    return save_checkpoint(
        run.checkpoints, Progress(step=step, draw=step), {"w": torch.ones(9)}, {"w.m": torch.ones(9)}
    )


def test_an_interrupted_run(run: RunFolder) -> None:
    summary = summarise_run(run)
    assert (summary.state, summary.step, summary.total_steps, summary.tokens_seen) == ("interrupted", 4, 12, 512)
    assert summary.bits_per_byte == 3.5
    assert summary.num_bytes == sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    assert 0 <= summary.seconds_since_change < 60


def test_a_stopped_and_a_finished_run(run: RunFolder) -> None:
    run.stopped_marker.touch()
    assert summarise_run(run).state == "stopped"
    save(run, 12)
    assert summarise_run(run).state == "finished"


def test_a_run_is_running_while_a_process_holds_its_folder(run: RunFolder) -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert summarise_run(run).state == "running"
        with pytest.raises(UserError, match=f"in use by another process .pid {process.pid}"), run.locked():
            pass
        process.kill()
        process.wait()
    assert summarise_run(run).state == "interrupted"  # the lock died with it; its pid still stands in the file


def test_looking_at_a_run_does_not_keep_another_from_beginning(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look takes the lock for an instant; whoever wants the folder then tries again."""
    monkeypatch.setattr(folder, "SECONDS_OF_A_GLANCE", 30)  # a busy machine may stop a process in the middle of a look
    looks = """
import sys, time
from pathlib import Path
from mambatrain.runs.folder import RunFolder
run, until = RunFolder(Path(sys.argv[1])), time.monotonic() + 60
print("looking", flush=True)
while time.monotonic() < until:
    run.is_running()
"""
    with run.locked():
        pass  # makes the lock file
    with subprocess.Popen([sys.executable, "-P", "-c", looks, run.path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "looking\n"
        until = time.monotonic() + 1
        while time.monotonic() < until:
            with run.locked():
                pass
        process.kill()


def test_a_run_that_cannot_be_read_is_listed_as_such(run: RunFolder) -> None:
    run.recipe_file.write_text("model: 3\n")
    summary = summarise_run(run)
    assert summary.state == "unreadable"
    assert summary.problem is not None
    assert str(run.recipe_file) in summary.problem


@pytest.mark.parametrize("line", [b"5", b"[1]", b'{"loss": 1}', b"\xff\xfe", b'{"event": ["step"]}'])
def test_lines_that_are_no_log_are_passed_over(run: RunFolder, line: bytes) -> None:
    """Of a disk that failed, or of another program: other runs are listed all the same."""
    with run.log_file.open("ab") as file:
        file.write(line + b"\n")
    assert summarise_run(run).step == 4
    assert [one["step"] for one in read_log(run.log_file)] == [0, 1, 2, 3, 4]


def test_a_log_of_another_program_is_said(run: RunFolder) -> None:
    run.log_file.write_text('{"event": "step"}\n')
    summary = summarise_run(run)
    assert summary.state == "unreadable"
    assert summary.problem == f"{run.log_file} has a step without 'step'"


def test_a_branch_file_that_cannot_be_read_is_named(run: RunFolder) -> None:
    assert read_branching(run) is None
    for content in ("{", "[]", '{"step": 1}'):
        run.branch_file.write_text(content)
        with pytest.raises(UserError, match=r"branched_from\.json cannot be read"):
            read_branching(run)


def test_runs_are_found_below_a_folder_but_not_within_a_run(run: RunFolder, tmp_path: Path) -> None:
    nested = tmp_path / "runs" / "sweep" / "small"
    aside = run.path / "before-1"
    too_deep = tmp_path / "runs" / "a" / "b" / "c" / "d"
    for made in (nested, aside, too_deep):
        made.mkdir(parents=True)
        (made / "recipe.yaml").write_bytes(run.recipe_file.read_bytes())
    assert find_runs(tmp_path / "runs") == [run.path, nested]
    assert find_runs(run.path) == [run.path]
    with pytest.raises(UserError, match="there is no folder"):
        find_runs(tmp_path / "nothing")
    with pytest.raises(UserError, match="is no run"):
        open_run(tmp_path / "runs")


def test_the_end_of_a_long_log_is_read_and_a_torn_line_passed_over(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    step = json.dumps({"event": "step", "step": 1, "filling": "x" * 1000})
    log.write_text(json.dumps({"event": "held_out", "step": 0}) + "\n" + f"{step}\n" * 3000 + '{"event": "st')
    assert log.stat().st_size > 1 << 20  # more than the first look
    end = read_log_end(log, frozenset({"step", "held_out"}))
    assert (end["held_out"]["step"], end["step"]["step"]) == (0, 1)
    assert read_log_end(log, frozenset({"nothing"})) == {}
    assert read_log_end(tmp_path / "none", frozenset({"step"})) == {}


def test_every_damaged_file_is_named(run: RunFolder) -> None:
    checkpoint = run.checkpoints / "step-00000004"
    assert list(damages_of(checkpoint)) == []
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)
    (checkpoint / "progress.json").unlink()
    damages = list(damages_of(checkpoint))
    assert len(damages) == 2
    assert any("model.safetensors was changed" in damage for damage in damages)
    assert any("progress.json is missing" in damage for damage in damages)
