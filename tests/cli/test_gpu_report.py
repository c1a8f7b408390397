"""`make gpu`, gone through on a CPU: what it needs is there, what is missing is said, the report is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambatrain.recipe import ModelSection

ROOT = Path(__file__).resolve().parents[2]


def test_a_trial_writes_a_report(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "kernels" / "gpu.py", "--trial", "--repeats", "1", "--out", tmp_path / "report"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report" / "report.md").read_text()
    for step in ("parity", "check", "benchmark"):
        assert f"- {step}: done" in report
    for what in (
        "selective_scan",
        "ssd",
        "conv + SiLU",
        "block's matrix products",
        "mamba1, tiny",
        "mamba2, tiny",
        "one token of decoding",
    ):
        assert what in report
    assert list(tmp_path.iterdir()) == [tmp_path / "report"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, ROOT / "kernels" / "gpu.py"], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr


def test_its_shapes_are_those_of_the_recipes() -> None:
    sys.path.insert(0, str(ROOT / "kernels"))
    try:
        from gpu_benchmark import PAPER, Shape
    finally:
        sys.path.remove(str(ROOT / "kernels"))
    for block in ("mamba1", "mamba2"):
        for d_model, num_layers in PAPER.values():
            ours = Shape(block, d_model, num_layers)
            section = ModelSection(block=block, d_model=d_model, num_layers=num_layers, vocab_size=ours.vocab_size)
            names = [*vars(ours), *(name for name, value in vars(Shape).items() if isinstance(value, property))]
            own_to_other = {"mamba1": {"num_heads"}, "mamba2": {"dt_rank_size"}}[block]
            for name in set(names) - own_to_other:
                assert getattr(ours, name) == getattr(section, name), name
