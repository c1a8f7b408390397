"""The mean of checkpoints against numpy's, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mambatrain.errors import UserError
from mambatrain.files import sha256_of
from mambatrain.models.parameters import initial_value, parameter_shapes
from mambatrain.recipe import read_recipe, write_recipe
from mambatrain.runs.average import average_checkpoints
from mambatrain.runs.checkpoint import Progress, save_checkpoint
from mambatrain.runs.folder import RunFolder
from mambatrain.runs.weights import read_weights

STEPS = (4, 8, 12)


@pytest.fixture
def run(write_tiny_recipe: Callable[..., Path], tiny_shards: Path, tmp_path: Path) -> RunFolder:
    """Three checkpoints of random weights."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    recipe = read_recipe(str(write_tiny_recipe()))
    folder.recipe_file.write_text(write_recipe(recipe))
    folder.tokenizer_file.write_bytes((tiny_shards / "tokenizer.json").read_bytes())
    for step in STEPS:
        model = {name: initial_value(name, recipe.model, step) + step for name in parameter_shapes(recipe.model)}
        progress = Progress(step=step, draw=step, tokens_seen=100 * step)
        save_checkpoint(folder.checkpoints, progress, model, {"w.exp_avg": torch.ones(1)})
    return folder


def test_it_is_the_mean_of_the_newest_and_reads_as_weights(run: RunFolder, tmp_path: Path) -> None:
    done = average_checkpoints(run, 2, tmp_path / "mean")
    assert [checkpoint.name for checkpoint in done.checkpoints] == ["step-00000008", "step-00000012"]
    weights = read_weights(str(done.folder))
    files = [load_file(checkpoint / "model.safetensors") for checkpoint in done.checkpoints]
    assert weights.tensors.keys() == files[0].keys()
    for name, tensor in weights.tensors.items():
        expected = np.mean([file[name].astype(np.float64) for file in files], axis=0).astype(np.float32)
        np.testing.assert_array_equal(tensor.numpy(), expected, err_msg=name)
    assert weights.section.architecture == read_recipe(str(run.recipe_file)).model.architecture
    assert weights.tokenizer_file == done.folder / "tokenizer.json"


def test_where_it_came_from_is_recorded(run: RunFolder, tmp_path: Path) -> None:
    done = average_checkpoints(run, 3, tmp_path / "mean")
    record = json.loads((done.folder / "average.json").read_text())
    assert [entry["step"] for entry in record["checkpoints"]] == list(STEPS)
    assert record["model_sha256"] == sha256_of(done.folder / "model.safetensors")
    for entry, checkpoint in zip(record["checkpoints"], done.checkpoints, strict=True):
        assert entry["model_sha256"] == sha256_of(checkpoint / "model.safetensors")
    assert sorted(path.name for path in done.folder.iterdir()) == [
        "average.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_mean_of_runs_on_conversations_spells_them_as_they_do(run: RunFolder, tmp_path: Path) -> None:
    for file in run.chat_files:
        file.write_text(f"{file.name} of the run")
    done = average_checkpoints(run, 2, tmp_path / "mean")
    assert [(done.folder / file.name).read_text() for file in run.chat_files] == [
        file.read_text() for file in run.chat_files
    ]


def test_what_cannot_be_averaged_is_refused_and_leaves_nothing(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 3 checkpoints, not 4") as refused:
        average_checkpoints(run, 4, tmp_path / "mean")
    assert "checkpoint.keep_newest=4" in str(refused.value.hint)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="taken exists"):
        average_checkpoints(run, 2, taken)
    file = run.checkpoints / "step-00000008" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"step-00000008/model.safetensors was changed"):
        average_checkpoints(run, 2, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
    assert not list(tmp_path.glob(".averaging-*"))


def test_an_error_while_writing_leaves_nothing(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="mean cannot be written: no space left"):
        average_checkpoints(run, 2, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
    assert not list(tmp_path.glob(".averaging-*"))
