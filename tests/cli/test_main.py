"""The command line as such: help that loads nothing heavy, exit codes, stdout and stderr apart."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import mambatrain
from mambatrain.ops.backends import BACKENDS

Run = Callable[..., subprocess.CompletedProcess[str]]

VERBS = [
    "",
    "tokenize",
    "tokenizer",
    "tokenizer inspect",
    "tokenizer train",
    "pretrain",
    "finetune",
    "data",
    "data check",
    "data inspect",
    "data merge",
    "data show",
    "data split",
    "plan",
    "doctor",
    "slurm",
    "evaluate",
    "generate",
    "chat",
    "state",
    "state make",
    "state show",
    "state blend",
    "export",
    "recipes",
    "recipes list",
    "recipes show",
    "runs",
    "runs archive",
    "runs average",
    "runs fetch",
    "runs list",
    "runs show",
    "runs verify",
    "kernels",
    "kernels build",
    "kernels check",
]
# pydantic is missing here: typer itself checks options with it. Our own users of it are named instead.
HEAVY = ["accelerate", "datasets", "matplotlib", "numpy", "pandas", "pyarrow", "rich", "safetensors", "tokenizers"]
HEAVY += ["torch", "transformers", "wandb", "yaml", "mambatrain.recipe", "mambatrain.training"]

# Runs the command line in a process whose commands the test may add to; `%s` is Python.
WITH_COMMAND = """
import sys
from mambatrain import cli
from mambatrain.errors import UserError
@cli.app.command()
def added():
    %s
sys.argv = ["mambatrain", "added"]
cli.main()
"""


def run_added(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", WITH_COMMAND % body], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_loads_nothing_heavy(verb: str) -> None:
    program = f"""
import sys
sys.argv = {["mambatrain", *verb.split(), "--help"]}
from mambatrain.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
print("loaded:", sorted(set({HEAVY}) & set(sys.modules)))
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    print(f"mambatrain {verb} --help: {time.perf_counter() - start:.2f} s")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: mambatrain {verb}".rstrip())
    assert done.stdout.endswith("loaded: []\n")
    assert done.stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_values_by_what_they_are(run_mambatrain: Run, verb: str) -> None:
    """DIR, FILE, N, or the choices: never a type of Python's."""
    text = run_mambatrain(*verb.split(), "--help").stdout
    assert [one for one in re.findall(r"<[^>]*>", text) if "|" not in one] == []
    kernels = re.search(r" --kernels\s+(<\S+>)", text)
    assert kernels is None or kernels[1] == f"<{'|'.join(BACKENDS)}>"


def test_the_verbs_tested_here_are_all_there_are(run_mambatrain: Run) -> None:
    def commands_of(*group: str) -> list[str]:
        lines = run_mambatrain(*group, "--help").stdout.splitlines()
        listed = lines[lines.index("Commands:") + 1 :]
        return [" ".join([*group, line.split()[0]]) for line in listed if line.startswith("  ") and line[2] != " "]

    groups = ["tokenizer", "data", "state", "recipes", "runs", "kernels"]
    assert sorted(VERBS) == sorted(["", *commands_of(), *(verb for group in groups for verb in commands_of(group))])


def test_the_version(run_mambatrain: Run) -> None:
    done = run_mambatrain("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mambatrain {mambatrain.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["pretran"], "No such command 'pretran'. Did you mean 'pretrain'?"),
        (["recipes", "show"], "Missing argument 'RECIPE'."),
        (["recipes", "list", "--colour"], "No such option: --colour"),
        (["pretrain", "demo", "--gpus", "two"], "Invalid value for '--gpus'"),
    ],
)
def test_a_usage_error_ends_with_2(run_mambatrain: Run, arguments: list[str], problem: str) -> None:
    done = run_mambatrain(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert problem in done.stderr
    assert done.stderr.startswith("Usage: mambatrain")


def test_a_mistake_gets_a_sentence_and_a_hint(run_mambatrain: Run) -> None:
    done = run_mambatrain("recipes", "show", "demos")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: there is no recipe file or shipped recipe named demos\n\n"
        "hint: did you mean the shipped recipe `demo`?\n"
    )


def test_a_mistake_without_a_hint_ends_with_its_sentence() -> None:
    done = run_added("raise UserError('no shards in x')")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: no shards in x\n")


def test_a_bug_keeps_its_traceback() -> None:
    done = run_added("raise ValueError('a bug')")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.endswith("ValueError: a bug\n")


def test_ctrl_c_ends_with_130_and_one_word() -> None:
    command = [sys.executable, "-P", "-c", WITH_COMMAND % "import time; print('up', flush=True); time.sleep(60)"]
    # A suite that was started in the background ignores SIGINT, and its children would, too.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  (no threads here)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "stopped\n")


@pytest.mark.parametrize("num_lines", [1, 100_000], ids=["caught at the end", "caught on the way"])
def test_a_reader_that_goes_away_is_no_error_message(num_lines: int) -> None:
    command = [sys.executable, "-P", "-c", WITH_COMMAND % f"[print('line') for _ in range({num_lines})]"]
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=buffered) as process:
        os.close(writing)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full stands for a full disk")
@pytest.mark.parametrize("num_lines", [1, 100_000], ids=["at the end", "on the way"])
def test_a_full_disk_behind_stdout_gets_a_sentence(num_lines: int) -> None:
    command = [sys.executable, "-P", "-c", WITH_COMMAND % f"[print('line') for _ in range({num_lines})]"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: stdout cannot be written: no space left on device\n")


def test_a_full_disk_elsewhere_is_not_blamed_on_stdout(tmp_path: Path) -> None:
    """An error that nothing has named is a bug, which keeps its traceback."""
    command = [
        sys.executable,
        "-P",
        "-c",
        WITH_COMMAND % "[print('line')]; raise OSError(28, 'No space left on device')",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "line\n\n")
    assert done.stderr.startswith("Traceback")


def test_no_color_is_obeyed_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    command = [Path(sys.executable).with_name("mambatrain"), "recipes", "show", "demos"]
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"}
    subprocess.run(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, check=False)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "error: there is no recipe" in shown
    assert "\x1b" not in shown


def test_python_dash_m_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mambatrain", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"mambatrain {mambatrain.__version__}\n")
