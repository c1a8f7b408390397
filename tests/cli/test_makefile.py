"""`make demo` in a folder of another name: every command works there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_demo_stays_in_the_folder_that_is_named() -> None:
    command = ["make", "--dry-run", "--always-make", "demo", "DEMO=elsewhere"]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    commands = [line.split("/mambatrain ", 1)[1] for line in printed.splitlines() if "/mambatrain " in line]
    verbs = ["tokenizer", "tokenize", "pretrain", "evaluate", "generate", "export"]
    assert [line.split()[0] for line in commands] == verbs
    assert "--out elsewhere/shards --held-out 0.02" in commands[1]
    assert "--set data.shards=elsewhere/shards" in commands[2]
    assert not [line for line in commands if "demo/" in line]
