"""Rows shared by 2, 3 and 4 processes: the losses and weights of one, and checkpoints that go on anywhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from launches import IN_FP64, PROMISED, assert_same_run, launch, tolerance_of, write_case

from mambatrain.recipe import read_recipe
from mambatrain.runs.folder import RunFolder, read_log
from mambatrain.training.assemble import open_data

# Few micro-batches: these ranks have all rows.
SHARED = {name: {**changes, "training__micro_batch_rows": 4} for name, changes in PROMISED.items()}
OTHERS: dict[str, dict[str, Any]] = {
    "frozen-fp64": {**IN_FP64, "parameters": {"frozen": ["embedding*", "layers.0.*"]}},
    "health-fp64": {**IN_FP64, "guards": {"health_every_steps": 3}, "data__row_tokens": 25},
    "mamba1-bf16": {"training__precision": "bf16"},
    # Behind step 4 rows become shorter; blocks are computed again in the backward pass.
    "stages-recomputed-fp64": {
        **IN_FP64,
        "training__rows_per_step": None,
        "training__tokens_per_step": 96,
        "training__activation_checkpointing": "every_block",
        "data__stages": [{"from_tokens": 500, "row_tokens": 12}],
    },
}
CASES = {**SHARED, **OTHERS}
PLACES = {"by 2": (2, 2), "by 3": (3, 3), "by 4": (4, 4), "2 groups by 2": (4, 2)}  # processes, and how many to a row
CASES_OF = {"by 2": list(SHARED), "by 3": list(CASES), "by 4": list(SHARED), "2 groups by 2": list(SHARED)}
MOVED = "mamba1-fp64"
MOVES = {  # from one place to another, behind its first checkpoint
    "3 to a row, then one process": ("by 3", 1, 1),
    "one process, then 4 to a row": ("one", 4, 4),
    "2 to a row, then 2 groups of 2": ("by 2", 4, 2),
    "3 to a row, then 4 with rows of their own": ("by 3", 4, 1),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, short_shards: Path) -> Path:
    """RUNS/PLACE/CASE of every case, and RUNS/MOVE resumed from the first checkpoint of another place."""
    folder = tmp_path_factory.mktemp("sequence")
    recipes = {name: write_case(folder / f"{name}.yaml", short_shards, changes) for name, changes in CASES.items()}

    def begun(place: str, sequence: int, names: list[str]) -> list[dict[str, Any]]:
        return [
            {"recipe": str(recipes[name]), "run": str(folder / place / name), "resume": "fresh", "sequence": sequence}
            for name in names
        ]

    def moved(world_size: int) -> list[dict[str, Any]]:
        return [
            {
                "recipe": str(recipes[MOVED]),
                "run": str(folder / move),
                "resume": "required",
                "origin": str(folder / place / MOVED),
                "sequence": sequence,
            }
            for move, (place, world, sequence) in MOVES.items()
            if world == world_size
        ]

    for world_size in (3, 1, 2, 4):  # each goes on from runs of those before it
        cases = begun("one", 1, list(CASES)) if world_size == 1 else []
        for place, (world, sequence) in PLACES.items():
            cases += begun(place, sequence, CASES_OF[place]) if world == world_size else []
        launch(world_size, cases + moved(world_size), folder)
    return folder


@pytest.mark.parametrize(("place", "case"), [(place, case) for place in PLACES for case in CASES_OF[place]])
def test_losses_and_weights_are_those_of_one_process(runs: Path, place: str, case: str) -> None:
    assert_same_run(runs / place / case, runs / "one" / case, tolerance_of(case))
    facts = json.loads((runs / place / case / "run.json").read_text())
    assert (facts["num_processes"], facts["sequence"]) == PLACES[place]


@pytest.mark.parametrize("move", MOVES)
def test_a_run_goes_on_elsewhere(runs: Path, move: str) -> None:
    assert_same_run(runs / move, runs / "one" / MOVED, 1e-10)


def test_what_counts_of_a_masked_row_lies_in_some_parts_alone(runs: Path) -> None:
    """Else the cases with masks would show nothing."""
    run = runs / "one" / "mamba2-masked-fp64"
    data = open_data(read_recipe(str(run / "recipe.yaml")), None, RunFolder(run), may_write=False)
    counts = [
        [batch.part(part, 4).num_targets for part in range(4)]
        for draw in range(20)
        for batch in data.order.micro_batches(draw, 1)
    ]
    assert any(0 in row and sum(row) > 0 for row in counts)
    assert len({sum(row) for row in counts}) > 3


def test_the_health_line_is_of_whole_rows(runs: Path) -> None:
    found, wanted = (
        [line for line in read_log(runs / place / "health-fp64" / "log.jsonl") if line["event"] == "health"]
        for place in ("by 3", "one")
    )
    assert len(wanted) == 3
    for line, alone in zip(found, wanted, strict=True):
        for layer, expected in zip(line["layers"], alone["layers"], strict=True):
            assert layer == pytest.approx(expected, rel=1e-9)
