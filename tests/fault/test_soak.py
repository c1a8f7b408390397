"""The short form of the soak: a run killed in every way, resumed on changing ranks and divisions, is the run itself."""

import os
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "long" / "soak.py"


def test_a_run_killed_on_changing_ranks_and_divisions_is_the_run_that_was_not(tmp_path: Path) -> None:
    command = [sys.executable, "-P", SOAK, "--kills", "6", "--seed", "5", "--soaks", "weights", "--folder", tmp_path]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills, nothing lost" in done.stdout
