"""1, 2 and 4 processes: the same order, the same losses, and a run that moves between them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from launches import PROMISED, assert_same_run, launch, losses, tolerance_of, write_case
from safetensors.numpy import load_file

from mambatrain.data.batches import IGNORED_TARGET
from mambatrain.data.drawn_rows import rows_of_draw
from mambatrain.data.training_data import open_training_data
from mambatrain.recipe import read_recipe
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.runs.folder import read_log

WORLD_SIZES = (2, 1, 4)  # 2 first: its checkpoint is what 1 and 4 resume from
CASES: dict[str, dict[str, Any]] = {
    **PROMISED,
    "short-fp64": {"training__precision": "fp64"},
    "short-fp32": {},
    "recomputed-fp64": {"training__precision": "fp64", "training__activation_checkpointing": "every_block"},
    "muon-fp64": {"training__precision": "fp64", "optimizer__kind": "muon"},
    "schedule-free-fp64": {
        "training__precision": "fp64",
        "optimizer__kind": "schedule_free",
        "schedule": {"kind": "constant"},
    },
    "guarded-fp64": {
        "training__precision": "fp64",
        "guards": {"max_sigma": 4.0, "memory_draws": 4, "health_every_steps": 3},
    },
    "narrow-fp64": {"training__precision": "fp64", "optimizer__state_precision": "bf16"},
}
# Two sources, the second a bare pair; within the run, behind step 4, the rows become shorter and the shares change.
CASES["mixture-fp64"] = {
    "training__precision": "fp64",
    "training__rows_per_step": None,
    "training__tokens_per_step": 96,
    "data__shards": None,
    "data__sources": [{"shards": "{shards}", "weight": 0.7}, {"shards": "{shards}/held_out", "weight": 0.3}],
    "data__stages": [
        {
            "from_tokens": 500,
            "row_tokens": 12,
            "sources": [{"shards": "{shards}/held_out", "weight": 2}, {"shards": "{shards}", "weight": 1}],
        }
    ],
}
CASES["carried-fp64"] = {
    "training__precision": "fp64",
    "training__micro_batch_rows": 1,
    "training__segment_tokens": 7,
    "data__carry_state": True,
}
MOVED = ("mixture-fp64", "carried-fp64")
# Pairs, each a row; their reference is what 2 processes made of the first case.
CASES["preferences-fp64"] = {
    "training__precision": "fp64",
    "training__rows_per_step": 8,
    "training__micro_batch_rows": 1,
    "model": None,
    "data": {"chats": {"files": ["{pairs}"], "format": "preference", "held_out": 0.3}, "row_tokens": 80},
    "preferences": {"beta": 0.5},
}
PAIRS = [
    {"prompt": f"{a} {b}?", "chosen": f"yes, {b}", "rejected": f"no, {a} " * n}
    for n, a in enumerate(("one", "two", "three"), 1)
    for b in ("four", "five", "six", "seven")
]
RESUMED = "short-fp32"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, short_shards: Path) -> Path:
    """RUNS/WORLD_SIZE/CASE of every case, and RUNS/WORLD_SIZE/moved-CASE resumed from step 4 of 2 processes."""
    folder = tmp_path_factory.mktemp("worlds")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    recipes = {name: write_case(folder / f"{name}.yaml", short_shards, changes) for name, changes in CASES.items()}
    file = recipes["preferences-fp64"]
    file.write_text(file.read_text().replace("{pairs}", str(folder / "pairs.jsonl")))
    for world_size in WORLD_SIZES:
        cases = [
            {"recipe": str(recipes[name]), "run": str(folder / str(world_size) / name), "resume": "fresh"}
            for name in CASES
        ]
        next(case for case in cases if "preferences" in case["recipe"])["weights"] = str(folder / "2" / "mamba1-fp64")
        for name in MOVED if world_size != 2 else ():
            moved = folder / str(world_size) / f"moved-{name}"
            shutil.copytree(folder / "2" / name, moved)
            for checkpoint in list_checkpoints(moved)[1:]:
                shutil.rmtree(checkpoint)
            cases.append({"recipe": str(recipes[name]), "run": str(moved), "resume": "required"})
        launch(world_size, cases, folder)
    # One more launch: a process that goes on must sum over ranks in the same order as one that never stopped.
    again = folder / "4" / "again"
    shutil.copytree(folder / "4" / RESUMED, again)
    for checkpoint in list_checkpoints(again)[1:]:
        shutil.rmtree(checkpoint)
    launch(4, [{"recipe": str(recipes[RESUMED]), "run": str(again), "resume": "required"}], folder)
    return folder


def skipped_draws(run: Path) -> list[int]:
    return [line["draw"] for line in read_log(run / "log.jsonl") if line["event"] == "skipped"]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_losses_do_not_depend_on_the_number_of_processes(runs: Path, case: str, world_size: int) -> None:
    assert_same_run(runs / str(world_size) / case, runs / "1" / case, tolerance_of(case))


def test_draws_are_judged_alike_on_any_number_of_processes(runs: Path) -> None:
    alone = skipped_draws(runs / "1" / "guarded-fp64")
    assert alone, "nothing was judged"
    assert skipped_draws(runs / "2" / "guarded-fp64") == skipped_draws(runs / "4" / "guarded-fp64") == alone


@pytest.mark.parametrize("case", MOVED)
@pytest.mark.parametrize("world_size", [1, 4])
def test_a_run_of_2_processes_goes_on_with_another_number(runs: Path, world_size: int, case: str) -> None:
    places = (f"{world_size}/moved-{case}", f"2/{case}")
    assert losses(runs / places[0]) == pytest.approx(losses(runs / places[1]), rel=1e-10)
    assert (list_checkpoints(runs / places[0])[-1] / "extra.safetensors").is_file() == (case == "carried-fp64")
    for file in ["model.safetensors"] + ["extra.safetensors"] * (case == "carried-fp64"):
        found, wanted = (load_file(list_checkpoints(runs / place)[-1] / file) for place in places)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert value == pytest.approx(wanted[name], rel=1e-8, abs=1e-10), name


@pytest.mark.parametrize(
    "place",
    [f"{world_size}/mixture-fp64" for world_size in (1, 2, 4)] + ["1/moved-mixture-fp64", "4/moved-mixture-fp64"],
)
def test_each_process_count_logs_the_rows_that_data_show_shows(runs: Path, place: str) -> None:
    run = runs / place
    order = open_training_data(read_recipe(str(run / "recipe.yaml")), may_write=False).order
    steps = [line for line in read_log(run / "log.jsonl") if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 9))
    for line in steps:
        rows = rows_of_draw(order, line["draw"])
        assert line["source_rows"] == {name: sum(row.source == name for row in rows) for name in order.names}
        assert line["num_targets"] == sum(target != IGNORED_TARGET for row in rows for target in row.targets)
        assert sum(line["source_rows"].values()) == (4 if line["step"] <= 6 else 8)


def test_4_processes_resumed_equal_4_that_never_stopped_to_the_bit(runs: Path) -> None:
    names = ("model.safetensors", "optimizer.safetensors", "progress.json")
    resumed, never_stopped = (list_checkpoints(runs / "4" / place)[-1] for place in ("again", RESUMED))
    assert [(resumed / name).read_bytes() for name in names] == [(never_stopped / name).read_bytes() for name in names]


def test_activation_checkpointing_changes_nothing(runs: Path) -> None:
    assert losses(runs / "1" / "recomputed-fp64") == losses(runs / "1" / "short-fp64")


def test_preferences_have_the_same_curves_in_any_number_of_processes(runs: Path) -> None:
    logs = [read_log(runs / str(world_size) / "preferences-fp64" / "log.jsonl") for world_size in WORLD_SIZES]
    for lines in zip(*logs, strict=True):
        names = [name for name in lines[0] if "reward" in name]
        assert len(names) == 4
        for name in names:
            assert [line[name] for line in lines[1:]] == pytest.approx([lines[0][name]] * 2, rel=1e-9, abs=1e-12), name
    assert logs[0][0]["held_out_reward_margin"] == pytest.approx(0.0, abs=1e-12)
    assert logs[0][-1]["held_out_reward_margin"] > 0.01
