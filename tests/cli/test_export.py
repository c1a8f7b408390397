"""`mambatrain export`: what a user sees."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mambatrain.models.parameters import initial_value, parameter_rows
from mambatrain.recipe import ModelSection, parse_recipe, write_recipe
from mambatrain.runs.checkpoint import Progress, save_checkpoint
from mambatrain.runs.weights import read_weights

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_folder(tmp_path: Path, tiny_shards: Path) -> Path:
    """A run as training leaves it."""
    section = ModelSection(d_model=16, num_layers=2, vocab_size=512, d_state=4)
    content = {
        "model": section.model_dump(),
        "data": {"shards": str(tiny_shards), "row_tokens": 8},
        "training": {"rows_per_step": 1, "total_steps": 200},
        "optimizer": {"learning_rate": 0.1},
    }
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(write_recipe(parse_recipe(content, "test")))
    (run / "tokenizer.json").write_bytes((tiny_shards / "tokenizer.json").read_bytes())
    tensors = {name: initial_value(name, section, 0) for name in parameter_rows(section)}
    save_checkpoint(run / "checkpoints", Progress(step=7, tokens_seen=99), tensors, {"x.step": torch.zeros(1)})
    return run


def test_a_run_is_exported_and_then_found(run_folder: Path, run_mambatrain: Run, tmp_path: Path) -> None:
    first = run_mambatrain("export", "run", "out")
    assert (first.returncode, first.stdout) == (0, "out\n"), first.stderr
    assert "read by transformers 5." in first.stderr
    assert "largest difference of logits: " in first.stderr
    assert "| tokens seen | 99 |" in (tmp_path / "out" / "README.md").read_text()
    second = run_mambatrain("export", "run", "out")
    assert (second.returncode, second.stdout) == (0, "out\n")
    assert "already exported; nothing was written" in second.stderr
    third = run_mambatrain("export", "out", "ssm", "--format", "mamba-ssm", "--dtype", "bf16")
    assert third.returncode == 0, third.stderr
    assert "mamba-ssm itself needs CUDA" in third.stderr
    stored = read_weights(str(tmp_path / "ssm")).tensors
    assert stored["embedding.weight"].dtype == torch.bfloat16
    assert stored["layers.0.mixer.A_log"].dtype == torch.float32
    assert json.loads((tmp_path / "ssm" / "config.json").read_text())["n_layer"] == 2


def test_mistakes_get_a_sentence_and_a_hint(run_folder: Path, run_mambatrain: Run, tmp_path: Path) -> None:
    missing = run_mambatrain("export", "./runn", "out")
    assert missing.returncode == 1
    assert missing.stdout == ""
    assert missing.stderr.startswith("error: there is no folder ./runn\n\nhint: name a run")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    taken = run_mambatrain("export", "run", "taken")
    assert taken.returncode == 1
    assert "error: taken exists and was made of something else\n\nhint: --overwrite" in taken.stderr
    assert "Traceback" not in taken.stderr
    usage = run_mambatrain("export", "run", "out", "--format", "onnx")
    assert usage.returncode == 2
    nowhere = run_mambatrain("export", "run", "/proc/x/out")
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    assert "error: /proc/x/out cannot be written: no such file or directory" in nowhere.stderr
    assert "hint: name a place where files can be written" in nowhere.stderr
    assert "Traceback" not in nowhere.stderr


def test_a_full_disk_is_told_and_nothing_is_left(run_folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the same error from the same calls."""
    done = subprocess.run(
        [Path(sys.executable).with_name("mambatrain"), "export", "run", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(
        "error: out cannot be written: file too large\n\nhint: nothing was kept of it; make room and run again\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_damaged_checkpoint_is_named_and_an_older_one_used(
    run_folder: Path, run_mambatrain: Run, tmp_path: Path
) -> None:
    section = ModelSection(d_model=16, num_layers=2, vocab_size=512, d_state=4)
    tensors = {name: initial_value(name, section, 1) for name in parameter_rows(section)}
    newer = save_checkpoint(run_folder / "checkpoints", Progress(step=8), tensors, {"x.step": torch.zeros(1)})
    (newer / "model.safetensors").write_bytes(b"short")
    warning = "warning  run/checkpoints/step-00000008/model.safetensors has 5 bytes"
    for arguments in (["export", "run", "out"], ["generate", "run", "--prompt", "a", "--max-new-tokens", "1"]):
        done = run_mambatrain(*arguments)
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning")]
        assert line.startswith(warning)
        assert line.endswith("; an older checkpoint is used")
