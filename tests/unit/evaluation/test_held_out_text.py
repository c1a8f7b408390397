"""Which text a model is measured on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mambatrain.errors import UserError
from mambatrain.evaluation.held_out_text import find_held_out_text


def run_of(write_tiny_recipe: Callable[..., Path], folder: Path, **changes: object) -> str:
    folder.mkdir()
    (folder / "recipe.yaml").write_bytes(write_tiny_recipe(**changes).read_bytes())
    return str(folder)


def test_a_run_is_measured_on_its_own_held_out_part(
    write_tiny_recipe: Callable[..., Path], tiny_shards: Path, tmp_path: Path
) -> None:
    text = find_held_out_text(run_of(write_tiny_recipe, tmp_path / "run"), None)
    assert text.tokens.where == tiny_shards
    assert text.batches.windows.shard is text.tokens.held_out
    assert text.batches.num_bytes


def test_a_named_pair_is_measured_whole_without_bytes(
    write_tiny_recipe: Callable[..., Path], tiny_shards: Path, tmp_path: Path
) -> None:
    pair = tiny_shards / "held_out"
    run = run_of(write_tiny_recipe, tmp_path / "run", data__held_out=str(pair))
    for text in (find_held_out_text(run, None), find_held_out_text(run, pair)):
        assert text.batches.windows.shard is text.tokens.train
        assert text.batches.num_bytes is None
        assert text.batches.num_documents > 0


def test_what_a_run_was_trained_on_is_never_taken_for_held_out(
    write_tiny_recipe: Callable[..., Path], tiny_shards: Path, tmp_path: Path
) -> None:
    run = run_of(write_tiny_recipe, tmp_path / "run", data__shards=str(tiny_shards / "train"))
    with pytest.raises(UserError, match="holds no held-out documents"):
        find_held_out_text(run, None)


def test_a_mixture_is_measured_on_its_first_source_in_its_longest_rows(
    write_tiny_recipe: Callable[..., Path], tiny_shards: Path, tmp_path: Path
) -> None:
    sources = [{"shards": str(tiny_shards), "weight": 1}, {"shards": str(tiny_shards / "train"), "weight": 1}]
    data = {"sources": sources, "row_tokens": 32, "stages": [{"from_tokens": 256, "row_tokens": 64}]}
    training = {"tokens_per_step": 128, "total_steps": 12}
    text = find_held_out_text(run_of(write_tiny_recipe, tmp_path / "run", data=data, training=training), None)
    assert (text.tokens.where, text.row_tokens) == (tiny_shards, 64)
