"""The Triton kernels without a GPU: interpreted, and compiled for the GPUs they are meant for.

All run in processes of their own, side by side: Triton is interpreted or not from its first import on. Nothing here
has run on a GPU; `tests/gpu` does where there is one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 600
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Architecture -> bytes of shared memory that a block may have."""
COMPILED = (*(("bfloat16", architecture) for architecture in MOST_SHARED), ("float32", 90))
"""What an H200 and its neighbours would run; the others by hand, see `tests/support/triton_cubins.py`."""
INTERPRETED = {"ssd": 56, "steps": 100}
"""File -> how many tests it has at least."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed, it comes with torch for CUDA"
)


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All processes, begun at once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pairs = [f"{dtype}:{architecture}" for dtype, architecture in COMPILED]
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    commands = {
        **{name: [*pytest_, f"parity/interpreted/{name}.py"] for name in INTERPRETED},
        "compiled": [sys.executable, "-W", "error", "support/triton_cubins.py", *pairs],
    }
    environments = {name: environment | {"TRITON_INTERPRET": "1"} for name in INTERPRETED} | {"compiled": environment}
    options: dict[str, Any] = {"cwd": TESTS, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = {
        name: subprocess.Popen(command, env=environments[name], **options) for name, command in commands.items()
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def cubins(started: dict[str, subprocess.Popen[str]]) -> list[dict[str, Any]]:
    out, err = started["compiled"].communicate(timeout=TIMEOUT_SECONDS)
    assert started["compiled"].returncode == 0, err
    found: list[dict[str, Any]] = json.loads(out)
    return found


@pytest.mark.parametrize(("dtype", "architecture"), COMPILED)
def test_cubins(dtype: str, architecture: int, cubins: list[dict[str, Any]]) -> None:
    """Every kernel compiles; no register spills, no atomic operation, no more shared memory than there is."""
    found = [line for line in cubins if (line["dtype"], line["architecture"]) == (dtype, architecture)]
    assert len(found) == 15
    for line in found:
        assert (line["stack"], line["local"], line["atomics"]) == (0, 0, 0), line
        assert line["shared"] <= MOST_SHARED[architecture], line
        assert line["registers"] <= 255, line


def test_two_blocks_share_a_multiprocessor_of_an_h200(cubins: list[dict[str, Any]]) -> None:
    """Kernels whose programs are a tile of a head: 65536 registers and 227 KiB for two blocks."""
    once = {"find_decays", "find_scores", "find_grad_scores", "find_grad_delta"}
    for line in cubins:
        if (line["dtype"], line["architecture"]) == ("bfloat16", 90) and line["kernel"] not in once:
            threads = 128 if line["kernel"].startswith(("pass_states", "step_")) else 256
            assert 2 * threads * line["registers"] <= 65536, line
            assert 2 * line["shared"] <= MOST_SHARED[90], line


@pytest.mark.parametrize("name", INTERPRETED)
def test_kernels_interpreted(name: str, started: dict[str, subprocess.Popen[str]]) -> None:
    out, _ = started[name].communicate(timeout=TIMEOUT_SECONDS)
    assert started[name].returncode == 0, out
    counts = re.search(r"(\d+) tests passed, 0 failed, (\d+) skipped", out)
    assert counts is not None, out
    assert int(counts[1]) >= INTERPRETED[name], out
