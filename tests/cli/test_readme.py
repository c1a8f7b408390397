"""The README does what it says: its commands run, small, on a small text; its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
Run = Callable[..., subprocess.CompletedProcess[str]]

# What makes a command of the README small.
SMALL = {
    "pretrain": ["model.d_model=32", "model.num_layers=2", "data.row_tokens=64", "training.total_tokens=2048"],
    "finetune": ["data.row_tokens=64", "training.rows_per_step=4", "training.total_tokens=1024"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("console") for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [shlex.split(line.removeprefix("$ ")) for line in lines]


def small(arguments: list[str]) -> list[str]:
    sets = [part for setting in SMALL.get(arguments[0], []) for part in ("--set", setting)]
    return [*arguments, *sets, *(["--max-new-tokens", "8"] if arguments[0] == "generate" else [])]


@pytest.fixture
def my_text(tmp_path: Path) -> None:
    folder = tmp_path / "my_text"
    folder.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in [
        "argparse",
        "ast",
        "calendar",
        "datetime",
        "decimal",
        "doctest",
        "inspect",
        "logging/__init__",
        "typing",
    ]:
        shutil.copy(library / f"{name}.py", folder / f"{name.replace('/', '_')}.py")


@pytest.mark.usefixtures("my_text")
def test_every_command_runs(run_mambatrain: Run, tmp_path: Path) -> None:
    verbs = []
    for program, *arguments in commands():
        if program == "make":  # the targets do what the rest of this test and CI do; here they must only exist
            done = subprocess.run(
                ["make", "-n", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
            )
        else:
            assert program == "mambatrain"
            done = run_mambatrain(*small(arguments))
            verbs.append(arguments[0])
        assert done.returncode == 0, f"{program} {shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    assert verbs.count("export") == 2
    assert {"tokenizer", "tokenize", "pretrain", "evaluate", "generate", "finetune", "recipes"} < set(verbs)
    (python,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-P", "-c", python], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Once upon a time" in done.stdout


def test_its_links_lead_to_files() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", README)
    local = [target for target in targets if not target.startswith("https://")]
    assert "docs/first_run.md" in local
    assert [target for target in local if not (REPOSITORY / target).exists()] == []


def test_it_stays_short() -> None:
    assert len(README.splitlines()) <= 150
