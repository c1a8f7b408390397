"""`mambatrain runs` on a run that was trained for it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def trained(run_mambatrain: Run, write_tiny_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    recipe = write_tiny_recipe(checkpoint__keep_newest=3, checkpoint__keep_best=False)
    done = run_mambatrain("pretrain", recipe, "--run", "runs/tiny", "--kernels", "torch", "--quiet")
    assert done.returncode == 0, done.stderr
    return tmp_path / "runs" / "tiny"


def test_list_show_verify_average(run_mambatrain: Run, trained: Path, tiny_shards: Path, tmp_path: Path) -> None:
    listed = run_mambatrain("runs", "list")
    assert (listed.returncode, listed.stderr) == (0, "")
    headings, line = listed.stdout.splitlines()
    assert headings.split() == ["name", "model", "step", "tokens", "bits/byte", "state", "age", "size"]
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    bits = [entry["held_out_bits_per_byte"] for entry in log if entry["event"] == "held_out"][-1]
    tokens = [entry["tokens_seen"] for entry in log if entry["event"] == "step"][-1]
    assert line.split()[:7] == ["tiny", "mamba1", "16x2", "12/12", f"{tokens:,}", f"{bits:.4f}", "finished"]

    shown = run_mambatrain("runs", "show", trained)
    assert (shown.returncode, shown.stderr) == (0, "")
    for part in (
        "finished, step 12 of 12",
        "step-00000004",
        "step-00000012",
        f"{bits:.4f} bits per byte",
        "row_tokens: 32",
    ):
        assert part in shown.stdout
    assert f"picture      {trained / 'loss.png'}" in shown.stdout
    assert "torch: asked for" in shown.stdout
    assert "█" in shown.stdout

    verified = run_mambatrain("runs", "verify", trained)
    assert (verified.returncode, verified.stderr) == (0, "")
    assert verified.stdout == "step-00000004  whole\nstep-00000008  whole\nstep-00000012  whole\n"

    averaged = run_mambatrain("runs", "average", trained, "--last", "3", "--out", "mean")
    assert (averaged.returncode, averaged.stdout) == (0, "mean\n"), averaged.stderr
    assert averaged.stderr == "averaged step-00000004, step-00000008, step-00000012\n"
    evaluated = run_mambatrain("evaluate", "mean", "--data", tiny_shards, "--json", "-", "--kernels", "torch")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["held_out"]["bits_per_byte"] < log[0]["held_out_bits_per_byte"]
    exported = run_mambatrain("export", "mean", "exported")
    assert exported.returncode == 0, exported.stderr


def test_finetune_starts_from_an_average(
    run_mambatrain: Run, trained: Path, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    assert run_mambatrain("runs", "average", trained, "--last", "2", "--out", "mean").returncode == 0
    recipe = write_tiny_recipe(model=None, training__total_steps=2)
    done = run_mambatrain("finetune", recipe, "--from", "mean", "--run", "runs/again", "--kernels", "torch", "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/again/run.json").read_text())["started_from"]["origin"] == "mean"


def test_an_archive_is_fetched_and_goes_on(run_mambatrain: Run, trained: Path, tmp_path: Path) -> None:
    archived = run_mambatrain("runs", "archive", trained, f"file://{tmp_path}/away/tiny")
    assert (archived.returncode, archived.stdout) == (0, f"file://{tmp_path}/away/tiny\n"), archived.stderr
    assert archived.stderr.startswith("copied 9 files, ")
    fetched = run_mambatrain("runs", "fetch", "away/tiny", "runs/back")
    assert (fetched.returncode, fetched.stdout) == (0, "runs/back\n"), fetched.stderr
    assert run_mambatrain("runs", "verify", "runs/back").stdout == "step-00000012  whole\n"
    recipe = trained / "recipe.yaml"
    done = run_mambatrain("pretrain", recipe, "--run", "runs/back", "--kernels", "torch", "--resume", "--quiet")
    assert done.returncode == 0, done.stderr
    again = run_mambatrain("runs", "archive", "runs/back", "s3://bucket/tiny")
    assert again.returncode == 1
    assert "hint: pip install s3fs" in again.stderr


def test_verify_names_each_damaged_file_and_ends_with_1(run_mambatrain: Run, trained: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        file = trained / "checkpoints" / "step-00000008" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    done = run_mambatrain("runs", "verify", "runs/tiny")
    assert done.returncode == 1
    assert "step-00000008  damaged\n" in done.stdout
    assert "step-00000008/model.safetensors was changed" in done.stdout
    assert "step-00000008/optimizer.safetensors was changed" in done.stdout
    assert "step-00000012  whole" in done.stdout
    assert done.stderr.startswith("error: 1 of 3 checkpoints of runs/tiny are damaged\n\nhint: ")


def test_what_is_no_run_is_said(run_mambatrain: Run, tmp_path: Path) -> None:
    done = run_mambatrain("runs", "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no folder runs" in done.stderr
    (tmp_path / "runs").mkdir()
    done = run_mambatrain("runs", "list")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "no runs in runs\n")
    for verb, rest in (("show", []), ("verify", []), ("average", ["--last", "2", "--out", "x"]), ("archive", ["x"])):
        done = run_mambatrain("runs", verb, "runs", *rest)
        assert (done.returncode, done.stdout) == (1, "")
        assert "runs is no run" in done.stderr


def test_a_run_whose_recipe_is_damaged_does_not_hide_the_others(run_mambatrain: Run, trained: Path) -> None:
    shutil.copytree(trained, trained.with_name("broken"))
    (trained.with_name("broken") / "recipe.yaml").write_text("model: {}\n")
    done = run_mambatrain("runs", "list")
    assert done.returncode == 0
    assert "unreadable" in done.stdout
    assert "finished" in done.stdout
    assert "warning  runs/broken: " in done.stderr
