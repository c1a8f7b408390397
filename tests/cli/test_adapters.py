"""Adapters on the command line: train, measure, continue a prompt, export, refuse; a state the same way."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[..., Path]


@pytest.fixture
def base(run_mambatrain: Run, write_tiny_recipe: Write, tmp_path: Path) -> Path:
    done = run_mambatrain("pretrain", write_tiny_recipe(), "--run", "base", "--quiet")
    assert done.returncode == 0, done.stderr
    return tmp_path / "base"


def held_out(run_mambatrain: Run, *arguments: str | Path) -> dict[str, Any]:
    done = run_mambatrain("evaluate", *arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    measured: dict[str, Any] = json.loads(done.stdout)["held_out"]
    return measured


def logged_loss(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return float([line for line in lines if line["event"] == "held_out"][-1]["held_out_loss"])


@pytest.mark.usefixtures("base")
def test_an_adapter_goes_the_whole_road(run_mambatrain: Run, write_tiny_recipe: Write, tmp_path: Path) -> None:
    adapter = {"targets": ["in_proj", "out_proj", "embedding"], "tune": ["A_log"]}
    recipe = write_tiny_recipe(model=None, adapter=adapter)
    done = run_mambatrain("finetune", recipe, "--from", "base", "--run", "tuned")
    assert done.returncode == 0, done.stderr
    assert "adapter        in_proj    2 of 2 layers" in done.stderr
    assert "adapter        A_log      2 of 2 layers" in done.stderr
    assert "adapter      tuned/adapter, " in done.stderr
    assert held_out(run_mambatrain, "tuned")["nats_per_token"] == pytest.approx(
        logged_loss(tmp_path / "tuned"), rel=1e-5
    )
    generated = [
        run_mambatrain(
            "generate", where, "--prompt", "def ", "--max-new-tokens", "8", "--seed", "1", "--temperature", "0"
        )
        for where in ("tuned", "tuned/adapter")
    ]
    assert [one.returncode for one in generated] == [0, 0] and generated[0].stdout == generated[1].stdout
    said = run_mambatrain("chat", "tuned", "--max-new-tokens", "3", stdin="hello\n")
    assert said.returncode == 0, said.stderr

    refused = run_mambatrain("export", "tuned", "out")
    assert refused.returncode == 1 and "--merge writes those" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert "and base is none" in run_mambatrain("export", "base", "out", "--merge").stderr
    merged = run_mambatrain("export", "tuned", "out", "--merge")
    assert merged.returncode == 0, merged.stderr
    assert "trained" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    lost = run_mambatrain("evaluate", "tuned")
    assert lost.returncode == 1 and "hint: name it: --base WEIGHTS" in lost.stderr
    found = held_out(run_mambatrain, "tuned", "--base", "elsewhere")
    assert found["nats_per_token"] == pytest.approx(logged_loss(tmp_path / "tuned"), rel=1e-5)
    average = run_mambatrain("runs", "average", "tuned", "--last", "2", "--out", "mean")
    assert average.returncode == 1 and "trained an adapter" in average.stderr


@pytest.mark.usefixtures("base")
def test_a_trained_state_goes_the_whole_road(
    run_mambatrain: Run, write_tiny_recipe: Write, tiny_shards: Path, tmp_path: Path
) -> None:
    recipe = write_tiny_recipe(model=None, adapter={"kind": "state"}, optimizer__learning_rate=0.1)
    done = run_mambatrain("finetune", recipe, "--from", "base", "--run", "tuned")
    assert done.returncode == 0, done.stderr
    assert "of them cut to a row" in done.stderr and "rows of one document each" in done.stderr
    state = "tuned/tuned.state.safetensors"
    measured = held_out(
        run_mambatrain, "base", "--state", state, "--data", tiny_shards, "--row-tokens", "32", "--max-tokens", "400"
    )
    assert measured["nats_per_token"] == pytest.approx(logged_loss(tmp_path / "tuned"), rel=1e-5)
    assert "none: a trained state" in run_mambatrain("state", "show", state).stdout
    common = ["--prompt", "def ", "--max-new-tokens", "8", "--temperature", "0", "--save-state", "behind.safetensors"]
    generated = run_mambatrain("generate", "base", "--state", state, *common)
    assert generated.returncode == 0, generated.stderr
    assert run_mambatrain("chat", "base", "--state", state, "--max-new-tokens", "3", stdin="hello\n").returncode == 0
    (tmp_path / "text.txt").write_text("import os\n")
    made = run_mambatrain("state", "make", "base", "--state", state, "--text", "text.txt", "-o", "made.safetensors")
    assert made.returncode == 0, made.stderr

    assert f"name those, and --state {state}" in run_mambatrain("generate", "tuned", "--prompt", "x").stderr
    behind = run_mambatrain("evaluate", "base", "--state", "behind.safetensors")
    assert behind.returncode == 1 and "stands behind a text" in behind.stderr
