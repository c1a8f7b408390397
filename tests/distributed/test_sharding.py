"""Weights divided over ranks: the losses and weights of one process, and checkpoints that fit any division."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launches import IN_FP64, PROMISED, assert_same_run, launch, tolerance_of, write_case

from mambatrain.runs.checkpoint import find_damage, list_checkpoints
from mambatrain.runs.checkpoint_tensors import model_files, read_model_tensors
from mambatrain.runs.folder import read_log
from mambatrain.runs.weights import read_weights

CASES: dict[str, dict[str, Any]] = {
    **PROMISED,
    "carried-fp64": {**IN_FP64, "data__carry_state": True},
    "recomputed-fp64": {"training__precision": "fp64", "training__activation_checkpointing": "every_block"},
    "schedule-free-fp64": {
        "training__precision": "fp64",
        "optimizer__kind": "schedule_free",
        "schedule": {"kind": "constant"},
    },
    "mamba2-fp32": {"model__block": "mamba2", "model__head_dim": 16},
    "mamba1-bf16": {"training__precision": "bf16"},
    "moments-bf16": {"optimizer__state_precision": "bf16"},
    "muon-bf16": {"optimizer__kind": "muon"},  # whatever the precision, it makes its updates in bf16
}
DIVISIONS = {"full over 2": (2, "full"), "full over 4": (4, "full"), "2 groups of 2": (4, "2")}
CASES_OF = {
    "one": list(CASES),
    "full over 2": list(CASES),
    "full over 4": ["carried-fp64"],
    "2 groups of 2": [*PROMISED, "carried-fp64", "mamba2-fp32"],
}
MOVED = "carried-fp64"
MOVES = {  # from a division to another, behind its first checkpoint
    "sharded to one process": ("full over 2", 1, "no"),
    "sharded to 4 processes with a copy each": ("full over 2", 4, "no"),
    "one process to sharded": ("one", 4, "full"),
    "2 shards to 4": ("full over 2", 4, "full"),
    "4 shards to 2 groups of 2": ("full over 4", 4, "2"),
}
AGAIN = "2 groups of 2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, short_shards: Path) -> Path:
    """RUNS/DIVISION/CASE of every case, and RUNS/MOVE resumed from the first checkpoint of another division."""
    folder = tmp_path_factory.mktemp("sharded")
    recipes = {name: write_case(folder / f"{name}.yaml", short_shards, changes) for name, changes in CASES.items()}

    def begun(division: str, shard: str) -> list[dict[str, str]]:
        return [
            {"recipe": str(recipes[name]), "run": str(folder / division / name), "resume": "fresh", "shard": shard}
            for name in CASES_OF[division]
        ]

    def resumed(run: Path, origin: Path, shard: str) -> dict[str, str]:
        recipe = str(recipes[origin.name])
        return {"recipe": recipe, "run": str(run), "resume": "required", "shard": shard, "origin": str(origin)}

    def moved(world_size: int) -> list[dict[str, str]]:
        return [
            resumed(folder / move, folder / origin / MOVED, shard)
            for move, (origin, world, shard) in MOVES.items()
            if world == world_size
        ]

    # In this order: the moves of a launch go on from runs of the ones before, or of its own.
    launch(2, begun("full over 2", "full"), folder)
    launch(1, begun("one", "no") + moved(1), folder)
    again = resumed(folder / "again", folder / AGAIN / "mamba2-fp32", "2")
    beside_training = {**CASES["mamba2-fp32"], "checkpoint__asynchronous": True}
    in_background = write_case(folder / "background.yaml", short_shards, beside_training)
    beside = {"recipe": str(in_background), "run": str(folder / "background"), "resume": "fresh", "shard": "2"}
    # A disk without room for the shard of rank 1; the same run goes on when there is some.
    full = []
    for name, recipe, origin in (
        ("waiting", recipes["mamba2-fp32"], folder / AGAIN / "mamba2-fp32"),
        ("beside", in_background, folder / "background"),
    ):
        case = {"recipe": str(recipe), "run": str(folder / f"full-{name}"), "resume": "required", "shard": "2"}
        full += [case | {"origin": str(origin), "largest_file_of_rank_1": "9000"}, case]
    last = [again, beside, *full]
    launch(4, begun("full over 4", "full") + begun("2 groups of 2", "2") + moved(4) + last, folder)
    return folder


def tensor_names(checkpoint: Path) -> set[str]:
    """Of model and optimizer; which rank writes what several have is not always the same."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in model_files(checkpoint):
        with safe_open(file, "np") as opened:
            names |= set(opened.keys())
    return names


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(str(run)).tensors


@pytest.mark.parametrize(("division", "case"), [(name, case) for name in DIVISIONS for case in CASES_OF[name]])
def test_losses_and_weights_are_those_of_one_process(runs: Path, case: str, division: str) -> None:
    run = runs / division / case
    assert_same_run(run, runs / "one" / case, tolerance_of(case))
    counts = [line["num_targets"] for line in read_log(run / "log.jsonl") if line["event"] == "step"]
    assert len(model_files(list_checkpoints(run)[-1])) == DIVISIONS[division][0]
    assert counts == [line["num_targets"] for line in read_log(runs / "one" / case / "log.jsonl") if "loss" in line]


def test_a_rank_holds_its_share_alone(runs: Path) -> None:
    """Half of each matrix in either file; the files of 2 groups of 2 hold no part twice."""
    from safetensors import safe_open

    for division, (num_files, _) in DIVISIONS.items():
        parts: dict[str, list[int]] = {}
        for file in model_files(list_checkpoints(runs / division / MOVED)[-1]):
            with safe_open(file, "np") as opened:
                for name in opened.keys():  # noqa: SIM118  (no dict)
                    parts.setdefault(name, []).append(int(np.prod(opened.get_slice(name).get_shape())))
        whole = final_weights(runs / "one" / MOVED)
        assert {name: sum(parts[name]) for name in whole} == {name: value.numel() for name, value in whole.items()}
        shards = 2 if division == "2 groups of 2" else num_files
        assert max(parts["layers.0.mixer.in_proj.weight"]) == whole["layers.0.mixer.in_proj.weight"].numel() // shards


@pytest.mark.parametrize("move", MOVES)
def test_a_run_goes_on_divided_otherwise(runs: Path, move: str) -> None:
    assert_same_run(runs / move, runs / "one" / MOVED, 1e-10)


def test_resumed_in_the_same_division_it_equals_never_stopped_to_the_bit(runs: Path) -> None:
    resumed, never_stopped = (list_checkpoints(run)[-1] for run in (runs / "again", runs / AGAIN / "mamba2-fp32"))
    names = tensor_names(never_stopped)
    assert tensor_names(resumed) == names
    assert "embedding.weight.exp_avg" in names
    wanted = read_model_tensors(never_stopped, names)
    assert all(torch.equal(value, wanted[name]) for name, value in read_model_tensors(resumed, names).items())


def test_a_missing_or_changed_file_is_named(runs: Path, tmp_path: Path) -> None:
    whole = list_checkpoints(runs / "2 groups of 2" / MOVED)[-1]
    copy = tmp_path / whole.name
    shutil.copytree(whole, copy)
    files = sorted(copy.iterdir())
    assert [file.suffix for file in files] == [".json"] * 2 + [".safetensors"] * 4
    for file in files:
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for damage, damaged in (("missing", None), ("changed", flipped), ("bytes where", content[:-1])):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            found = str(find_damage(copy))
            if file.name != "manifest.json":
                assert f"{file} " in found
                assert damage in found
            assert found != "None" or damage == "bytes where"  # the line end of the manifest
        file.write_bytes(content)
    assert find_damage(whole) is None


def test_saves_in_the_background_write_the_same_bytes(runs: Path) -> None:
    waited, beside = list_checkpoints(runs / AGAIN / "mamba2-fp32"), list_checkpoints(runs / "background")
    assert (
        [folder.name for folder in waited] == [folder.name for folder in beside] == ["step-00000004", "step-00000008"]
    )
    for one, other in zip(waited, beside, strict=True):
        assert {file.name: file.read_bytes() for file in one.iterdir()} == {
            file.name: file.read_bytes() for file in other.iterdir()
        }


@pytest.mark.parametrize("name", ["waiting", "beside"])
def test_a_full_disk_of_one_rank_is_said_by_all_and_the_run_goes_on(runs: Path, name: str) -> None:
    run = runs / f"full-{name}"
    said = {(runs / f"{run.name}.error-{rank}").read_text() for rank in range(4)}
    assert len(said) == 1
    assert f"the disk is full: checkpoint {run / 'checkpoints' / 'step-00000008'} was not written" in said.pop()
    assert (runs / f"{run.name}.left").read_text().split() == ["step-00000004"]
    newest, never_full = list_checkpoints(run)[-1], list_checkpoints(runs / AGAIN / "mamba2-fp32")[-1]
    assert newest.name == never_full.name
    assert (newest / "manifest.json").read_bytes() == (never_full / "manifest.json").read_bytes()


def test_some_tensors_of_a_sharded_checkpoint_are_read_alone(runs: Path) -> None:
    tensors = read_model_tensors(list_checkpoints(runs / "full over 4" / MOVED)[-1], ["norm_f.weight", "nothing"])
    assert list(tensors) == ["norm_f.weight"]
    assert tensors["norm_f.weight"].shape == (16,)
