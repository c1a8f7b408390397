"""What `auto` comes to: by the memory that is free, once, the same on every rank, and kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mambatrain.devices import end_processes
from mambatrain.errors import UserError
from mambatrain.models import language_model
from mambatrain.models.flops import count_parameters
from mambatrain.recipe import Recipe, read_recipe
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.runs.folder import read_log
from mambatrain.training import resolve as resolving
from mambatrain.training.assemble import Where
from mambatrain.training.fitting import choose_micro_batch_rows
from mambatrain.training.resolve import Resolved, resolve, resolve_together
from mambatrain.training.sequence import RowShare
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

WHERE = Where(device="cpu", kernels="torch", quiet=True)
LAYERS, ROW = 6, 32
# By hand, for d_model 16 and E 32: a layer keeps 2 x (40 x 16 + 20 x 32) bytes a token, one that is computed again
# 4 x 16, and one of those is whole at a time.
KEPT = {0: 6 * 2560 * ROW, 3: (5 * 2560 + 2 * 64) * ROW, 2: (4 * 2560 + 3 * 64) * ROW, 1: (2560 + 6 * 64) * ROW}
ReadRecipe = Callable[..., Recipe]


@pytest.fixture
def read(write_tiny_recipe: Callable[..., Path]) -> Iterator[ReadRecipe]:
    def recipe(**training: Any) -> Recipe:
        model = {"block": "mamba1", "d_model": 16, "num_layers": LAYERS, "vocab_size": 512, "d_state": 8}
        settings = {f"training__{name}": value for name, value in training.items()}
        settings = {"training__activation_checkpointing": "auto", "training__total_steps": 4, **settings}
        return read_recipe(str(write_tiny_recipe(model=model, checkpoint__every_steps=2, **settings)))

    yield recipe
    end_processes()


def memory_for(recipe: Recipe, activations: int) -> int:
    """Free bytes of which half of what the states leave is `activations`."""
    return 16 * count_parameters(recipe.model)["total"] + 2 * activations


def chosen(recipe: Recipe, free_bytes: int, share: RowShare | None = None, shards: int = 1) -> tuple[int, int]:
    resolved = resolve(recipe, None, "fp32", free_bytes, share or RowShare(), shards)
    assert resolved.recompute_chosen == (recipe.training.activation_checkpointing == "auto")
    return resolved.recompute_every, resolved.micro_batch_rows


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_fewest_blocks_are_computed_again_with_which_the_micro_batch_fits(read: ReadRecipe, rows: int) -> None:
    recipe = read(micro_batch_rows=rows)
    for fitting, smaller in ((0, 3), (3, 2), (2, 1), (1, 1)):  # one block alone saves nothing
        assert chosen(recipe, memory_for(recipe, rows * KEPT[fitting])) == (fitting, rows)
        assert chosen(recipe, memory_for(recipe, rows * KEPT[fitting] - 1)) == (smaller, rows)
    assert chosen(recipe, 0) == (1, rows)


def test_with_rows_auto_nothing_is_computed_again_as_long_as_one_row_fits(read: ReadRecipe) -> None:
    recipe = read()
    assert chosen(recipe, memory_for(recipe, 4 * KEPT[0])) == (0, 4)
    assert chosen(recipe, memory_for(recipe, 3 * KEPT[0])) == (0, 2)  # a divisor of the 4 rows of a step
    assert chosen(recipe, memory_for(recipe, KEPT[0])) == (0, 1)
    assert chosen(recipe, memory_for(recipe, KEPT[0] - 1)) == (3, 1)
    assert chosen(recipe, memory_for(recipe, KEPT[1])) == (1, 1)


def test_parts_of_rows_need_a_part_and_a_divided_model_has_room(read: ReadRecipe) -> None:
    recipe = read(micro_batch_rows=2)
    halves = RowShare(num_groups=1, num_parts=2)
    assert chosen(recipe, memory_for(recipe, KEPT[0]), halves) == (0, 2)
    assert chosen(recipe, memory_for(recipe, KEPT[0] - 1), halves) == (3, 2)
    parameters = count_parameters(recipe.model)["total"]
    divided = 16 * parameters // 4 + 4 * parameters + 2 * 2 * KEPT[0]
    assert chosen(recipe, divided, shards=4) == (0, 2)
    assert chosen(recipe, divided - 2, shards=4) == (3, 2)
    assert chosen(recipe, divided)[0] > 0, "a copy of the model leaves less"


def test_a_stage_of_longer_rows_has_to_fit_too(read: ReadRecipe) -> None:
    recipe = read(micro_batch_rows=1, rows_per_step=None, tokens_per_step=128)
    stage = [{"from_tokens": 256, "row_tokens": 64}]
    longer = recipe.model_copy(
        update={"data": recipe.data.model_validate(recipe.data.model_dump() | {"stages": stage})}
    )
    assert chosen(longer, memory_for(recipe, 2 * KEPT[0]))[0] == 0
    assert chosen(longer, memory_for(recipe, 2 * KEPT[0] - 1))[0] == 3
    assert chosen(recipe, memory_for(recipe, KEPT[0]))[0] == 0


def test_what_the_recipe_says_is_taken(read: ReadRecipe) -> None:
    for said, every in (("none", 0), ("every_block", 1), (3, 3)):
        recipe = read(activation_checkpointing=said)
        free = memory_for(recipe, KEPT[1])
        assert chosen(recipe, free) == (every, choose_micro_batch_rows(recipe, 4, free))


def test_ranks_take_what_fits_the_one_with_least_memory(monkeypatch: pytest.MonkeyPatch, read: ReadRecipe) -> None:
    recipe = read()
    least, most = memory_for(recipe, KEPT[2]), memory_for(recipe, 4 * KEPT[0])
    cpu, share = resolving.torch.device("cpu"), RowShare()

    def together(others: list[Any], own: int, recorded: Any) -> Resolved:
        monkeypatch.setattr(resolving, "available_memory_bytes", lambda _: own)
        monkeypatch.setattr(resolving, "from_all_processes", lambda value: [*others, value])
        return resolve_together(recipe, recorded, "fp32", cpu, share, 1)

    assert together([("fp32", most, None)], least, None) == together([("fp32", least, None)], most, None)
    assert together([("fp32", least, None)], most, None) == Resolved("fp32", 1, 2, True)
    # What rank 0 has read of the run counts: a shared disk may show the others an older state of it.
    older = {"precision": "fp32", "micro_batch_rows": 2, "recompute_every": 3, "recompute_chosen": True}
    assert together([("fp32", most, older)], most, None) == Resolved("fp32", 2, 3, True)
    with pytest.raises(UserError, match=r"training\.precision is bf16 on some processes and fp32 on others"):
        together([("bf16", most, None)], most, None)


def test_processes_on_a_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "available_memory_bytes", lambda _: 900)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert resolving.memory_of_process(resolving.torch.device("cpu")) == 300
    assert resolving.memory_of_process(resolving.torch.device("cuda")) == 900


def train(recipe: Recipe, folder: Path, branch_from: Path | None = None) -> dict[str, Any]:
    assert run_training(recipe, folder, WHERE, "if-possible", StopRequest(), branch_from=branch_from) == 0
    facts: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return facts


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl") if line["event"] == "step"]


def forget_the_end(folder: Path) -> None:
    shutil.rmtree(list_checkpoints(folder)[-1])


def test_a_run_computes_again_what_was_chosen_to_the_same_losses_and_keeps_it(
    monkeypatch: pytest.MonkeyPatch, read: ReadRecipe, tmp_path: Path
) -> None:
    calls = [0]
    real = language_model.checkpoint

    def counted(*arguments: Any, **settings: Any) -> Any:
        calls[0] += 1
        return real(*arguments, **settings)

    monkeypatch.setattr(language_model, "checkpoint", counted)
    recipe, run = read(micro_batch_rows=4), tmp_path / "auto"
    monkeypatch.setattr(resolving, "available_memory_bytes", lambda _: memory_for(recipe, 4 * KEPT[2]))
    facts = train(recipe, run)
    assert (facts["recompute_every"], facts["recompute_chosen"], calls[0]) == (2, True, 4 * LAYERS // 2)
    train(read(micro_batch_rows=4, activation_checkpointing="none"), tmp_path / "none")
    assert losses(run) == losses(tmp_path / "none")
    assert read_recipe(str(run / "recipe.yaml")).training.activation_checkpointing == "auto"

    monkeypatch.setattr(resolving, "available_memory_bytes", lambda _: 2**40)  # nothing would be computed again now
    forget_the_end(run)
    assert train(recipe, run)["recompute_every"] == 2
    assert losses(run) == losses(tmp_path / "none")
    assert calls[0] == (4 + 2) * LAYERS // 2
    for setting in ("activation_checkpointing=none", "micro_batch_rows=2"):  # as any other setting of a run
        with pytest.raises(UserError, match=f"holds a run of another recipe:\n  training.{setting.split('=')[0]}: "):
            train(read_recipe(str(run / "recipe.yaml"), [f"training.{setting}"]), run)

    checkpoint = list_checkpoints(run)[0]
    assert train(recipe, tmp_path / "branch", checkpoint)["recompute_every"] == 2
    said = read_recipe(str(run / "recipe.yaml"), ["training.activation_checkpointing=3"])
    facts = train(said, tmp_path / "said", checkpoint)
    assert (facts["recompute_every"], facts["recompute_chosen"]) == (3, False)
    facts = train(recipe, tmp_path / "auto-again", list_checkpoints(tmp_path / "said")[0])
    assert (facts["recompute_every"], facts["recompute_chosen"]) == (0, True), "3 was said, not chosen"


def test_a_run_from_before_the_field_goes_on(read: ReadRecipe, tmp_path: Path) -> None:
    recipe, run = read(activation_checkpointing="every_block"), tmp_path / "run"
    whole = train(recipe, run)
    before, facts = losses(run), dict(whole)
    del facts["recompute_every"], facts["recompute_chosen"]
    (run / "run.json").write_text(json.dumps(facts))
    forget_the_end(run)
    again = train(recipe, run)
    assert {name: again[name] for name in again if name != "kernels"} == {
        name: whole[name]
        for name in whole
        if name != "kernels"  # which says how long the self-check took
    }
    assert losses(run) == before
