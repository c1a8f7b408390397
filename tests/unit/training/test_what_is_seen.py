"""`data show` agrees with what training was given, and the log with both; a bare pair is trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mambatrain.data.batches import IGNORED_TARGET
from mambatrain.data.drawn_rows import rows_of_draw
from mambatrain.data.training_data import open_training_data
from mambatrain.devices import end_processes
from mambatrain.recipe import Recipe, read_recipe
from mambatrain.runs.folder import read_log
from mambatrain.training.assemble import Where
from mambatrain.training.objective import NextTokenLoss
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

Given = list[tuple[list[int], list[bool], list[int]]]  # tokens, boundaries, targets of each row


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[Given]:
    """Every row that the objective is given, in order."""
    rows: Given = []
    forward = NextTokenLoss.forward

    def record(self: NextTokenLoss, tokens: Any, boundaries: Any, targets: Any) -> Any:
        rows.extend(zip(tokens.tolist(), boundaries.tolist(), targets.tolist(), strict=True))
        return forward(self, tokens, boundaries, targets)

    monkeypatch.setattr(NextTokenLoss, "forward", record)
    yield rows
    end_processes()


def train(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    where = Where(device="cpu", kernels="torch", quiet=True)
    assert run_training(recipe, folder, where, "if-possible", StopRequest()) == 0
    return read_log(folder / "log.jsonl")


@pytest.mark.parametrize("packing", ["windows", "best_fit"])
def test_what_show_shows_is_what_training_was_given(
    write_tiny_recipe: Callable[..., Path], tiny_shards: Path, tmp_path: Path, given: Given, packing: str
) -> None:
    shutil.copytree(tiny_shards, tmp_path / "tokens")  # packings are kept beside the shards
    pair = str(tmp_path / "tokens" / "held_out")  # by its prefix: a bare pair
    sources = [{"shards": str(tmp_path / "tokens"), "weight": 0.7}, {"shards": pair, "weight": 0.3, "max_epochs": 9}]
    stages = [{"from_tokens": 600, "row_tokens": 64}, {"from_tokens": 1200, "sources": [{"shards": pair, "weight": 1}]}]
    data = {"sources": sources, "stages": stages, "row_tokens": 32, "seed": 5, "packing": packing}
    training = {"tokens_per_step": 128, "total_steps": 12, "precision": "fp32", "micro_batch_rows": 2}
    recipe = read_recipe(str(write_tiny_recipe(data=data, training=training)))
    log = train(recipe, tmp_path / "run")

    order = open_training_data(recipe).order
    steps = [line for line in log if line["event"] == "step"]
    assert len(steps) == 12
    place, epochs = 0, dict.fromkeys(order.names, 0.0)
    for line in steps:
        rows = rows_of_draw(order, line["draw"])
        seen = given[place : place + len(rows)]
        assert seen == [(row.tokens, row.boundaries, row.targets) for row in rows]
        assert line["num_targets"] == sum(target != IGNORED_TARGET for _, _, targets in seen for target in targets)
        assert line["source_rows"] == {name: sum(row.source == name for row in rows) for name in order.names}
        for row in rows:
            stage = order.stages[order.stage_of(line["draw"])]
            epochs[row.source] += 1 / order.windows_of(row.source, stage.row_tokens).num_windows
        assert line["source_epochs"] == pytest.approx(epochs)
        place += len(rows)
    assert place == len(given)
    assert {len(row[0]) for row in given} == {32, 64}


def test_show_spells_out_every_token_once(write_tiny_recipe: Callable[..., Path]) -> None:
    order = open_training_data(read_recipe(str(write_tiny_recipe()))).order
    for row in rows_of_draw(order, 3):
        (span,) = row.spans
        assert span.ids[:-1] == row.tokens[: len(span.ids) - 1]
        assert span.ids[1:] == [target for target in row.targets if target != IGNORED_TARGET]
        assert [place for place, marked in enumerate(row.boundaries) if marked] == span.boundaries
        shard = order.stages[0].sources[0].windows.shard
        for place, document in zip(span.boundaries, span.documents, strict=True):
            following = shard.document(document)[: len(span.ids) - place - 1].tolist()
            assert span.ids[place + 1 : place + 1 + len(following)] == following


def test_a_bare_pair_is_trained_on_without_bits_per_byte(
    write_tiny_recipe: Callable[..., Path], tiny_shards: Path, tmp_path: Path, given: Given
) -> None:
    data = {
        "shards": str(tiny_shards / "train"),
        "held_out": str(tiny_shards / "held_out"),
        "row_tokens": 32,
        "seed": 3,
    }
    log = train(read_recipe(str(write_tiny_recipe(data=data))), tmp_path / "pair")
    of_pair, given[:] = list(given), []
    # The same tokens under a manifest give the same rows and losses.
    manifest = train(read_recipe(str(write_tiny_recipe())), tmp_path / "folder")
    assert of_pair == given
    for line, other in zip(log, manifest, strict=True):
        assert line.get("loss") == other.get("loss")
        assert line.get("held_out_loss") == other.get("held_out_loss")
    measured = [line for line in log if line["event"] == "held_out"]
    assert [line["held_out_bits_per_byte"] for line in measured] == [None] * len(measured)
    assert (tmp_path / "pair" / "loss.png").is_file()
    assert not any("source_rows" in line for line in log)


def test_training_goes_on_across_a_change_of_stage_as_if_never_stopped(
    write_tiny_recipe: Callable[..., Path], tiny_shards: Path, tmp_path: Path, given: Given
) -> None:
    pair = str(tiny_shards / "held_out")
    stages = [{"from_tokens": 700, "sources": [{"shards": pair, "weight": 1}]}]
    data = {"shards": str(tiny_shards), "stages": stages, "row_tokens": 32}
    recipe = read_recipe(str(write_tiny_recipe(data=data, checkpoint={"every_steps": 4, "keep_newest": 9})))
    whole = train(recipe, tmp_path / "run")
    rows, given[:] = list(given), []
    for checkpoint in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    again = train(recipe, tmp_path / "run")
    assert given == rows[4 * 4 :]  # from step 4 on, 4 rows a step; the stage changes in step 6
    assert [line.get("loss") for line in again] == [line.get("loss") for line in whole]
