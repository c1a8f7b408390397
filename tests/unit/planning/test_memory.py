"""What `plan` says of memory and disk is what a real run has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from mambatrain.data.token_shards import TokenShardWriter
from mambatrain.devices import end_processes
from mambatrain.errors import UserError
from mambatrain.ops.backends import choose_backend
from mambatrain.planning.hardware import GPUS, Device
from mambatrain.planning.memory import checkpoint_bytes, state_bytes
from mambatrain.planning.plan import Place, make_plan
from mambatrain.recipe import Recipe, parse_recipe
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.training import start
from mambatrain.training.assemble import Where
from mambatrain.training.background_save import BackgroundSave
from mambatrain.training.build import build_objective
from mambatrain.training.loop import train
from mambatrain.training.optimizer import build_optimizers
from mambatrain.training.start import run_training
from mambatrain.training.step_trace import StorageLog
from mambatrain.training.stop import StopRequest
from mambatrain.training.training_run import TrainingRun

WHERE = Where(device="cpu", kernels="torch", quiet=True)
ROOM = Device("a test's", 2**34, 1e12, 1e12, 1e12)
ReadRecipe = Callable[..., Recipe]


@pytest.fixture
def read(tmp_path: Path) -> Iterator[ReadRecipe]:
    """A recipe of documents that are longer than its rows; `section__field=value` changes it."""
    with TokenShardWriter(tmp_path / "tokens", np.dtype("<u2")) as writer:
        for length in (1, *[900] * 12):
            writer.append(np.arange(length) % 500)

    def recipe(**changes: Any) -> Recipe:
        content: dict[str, Any] = {
            "model": {"block": "mamba2", "d_model": 64, "num_layers": 2, "vocab_size": 500, "d_state": 16},
            "data": {"shards": str(tmp_path / "tokens"), "row_tokens": 96},
            "training": {"rows_per_step": 6, "total_steps": 2, "precision": "fp32", "micro_batch_rows": 2},
            "optimizer": {"learning_rate": 1e-3},
        }
        for path, value in changes.items():
            section, field = path.split("__")
            content.setdefault(section, {})[field] = value
        return parse_recipe(content, "a test")

    AcceleratorState._reset_state()  # precisions differ from test to test
    yield recipe
    end_processes()
    AcceleratorState._reset_state()


def place_of(recipe: Recipe) -> Place:
    precision = recipe.training.precision
    return Place(ROOM, True, 1, 1, precision, choose_backend("torch", torch.device("cpu")), 0.3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__activation_checkpointing": "every_block", "model__num_layers": 4},
        {"training__segment_tokens": 32},
        {"data__carry_state": True, "model__d_state": 64},
        {"data__carry_state": True, "training__segment_tokens": 32, "model__block": "mamba1", "data__row_tokens": 64},
        {"optimizer__kind": "muon", "training__rows_per_step": 2},
        {"model__vocab_size": 4000, "model__num_layers": 1, "training__rows_per_step": 2},
    ],
    ids=["plain", "recomputed", "segments", "carried", "both", "muon", "head"],
)
def test_a_run_holds_what_is_planned(
    monkeypatch: pytest.MonkeyPatch, read: ReadRecipe, tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe, begun = read(**changes), [0]

    def noting_when(run: TrainingRun, stop: StopRequest) -> bool:
        begun[0] = len(log.events)
        return train(run, stop)

    monkeypatch.setattr(start, "train", noting_when)
    with StorageLog() as log:
        assert run_training(recipe, tmp_path / "run", WHERE, "fresh", StopRequest()) == 0
    # What is there while it trains; the self-check and the measured peak were over before.
    held = np.cumsum([event.num_bytes for event in log.events])[begun[0] :].max()
    memory = make_plan(recipe, place_of(recipe)).memory
    planned = memory.total - memory.process - memory.holes
    assert planned == pytest.approx(held, rel=0.01)
    if recipe.model.vocab_size == 4000:
        assert memory.loss > 0.2 * planned
    if recipe.data.carry_state:  # what the slots go on from, and what their rows have left
        assert memory.states == 2 * 6 * state_bytes(recipe.model, 4)


def test_copies_of_a_model_keep_their_gradients_once_more(read: ReadRecipe, tmp_path: Path) -> None:
    """DDP's buckets, counted where DDP makes them."""
    recipe = read(training__rows_per_step=4)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with StorageLog() as log:
        backend = choose_backend("torch", torch.device("cpu"))
        objective, trained = build_objective(recipe, backend, torch.device("cpu"), "fp32", None, 1, True)
        optimizers = build_optimizers(trained, recipe.optimizer)
        copied = torch.nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True)
        tokens = torch.zeros(2, recipe.data.row_tokens, dtype=torch.int64)
        for _ in range(2):
            copied(tokens, torch.zeros_like(tokens, dtype=torch.bool), tokens).backward()
            for optimizer in optimizers:
                optimizer.step()
            copied.zero_grad(set_to_none=True)
    memory = make_plan(recipe, replace(place_of(recipe), num_devices=2)).memory
    assert memory.communication == memory.weights
    planned = memory.total - memory.process - memory.holes
    assert planned == pytest.approx(sum(log.trace().fullest().values()), rel=0.02)


def test_time_and_disk_by_hand(read: ReadRecipe) -> None:
    recipe = read()
    plan = make_plan(recipe, replace(place_of(recipe), utilisation=0.25, device=replace(ROOM, fp32_flops=2e9)))
    assert plan.total_tokens == 2 * 6 * 96
    assert plan.seconds == pytest.approx(plan.flops_per_token * 2 * 6 * 96 / 0.5e9)
    assert plan.tokens_per_second == pytest.approx(0.5e9 / plan.flops_per_token)
    assert plan.shard_bytes == 2 * 6 * 96 * 2
    assert make_plan(read(model__vocab_size=70_000), place_of(recipe)).shard_bytes == 2 * 6 * 96 * 4
    assert plan.usable_bytes == ROOM.memory_bytes
    halves = replace(place_of(recipe), num_devices=2)
    assert halves.usable_bytes == ROOM.memory_bytes // 2
    gpu = replace(halves, is_cpu=False)
    assert (gpu.free_bytes, gpu.usable_bytes) == (ROOM.memory_bytes, int(0.9 * ROOM.memory_bytes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__precision": "fp64"},
        {"optimizer__kind": "muon"},
        {"optimizer__kind": "schedule_free", "schedule__kind": "constant"},
        {"optimizer__state_precision": "bf16", "optimizer__beta2": 0.99},
        {"data__carry_state": True, "model__block": "mamba1", "data__row_tokens": 16},
    ],
    ids=["adamw", "fp64", "muon", "schedule-free", "bf16-moments", "carried"],
)
def test_a_copy_that_is_saved_and_its_files_are_as_large_as_planned(
    monkeypatch: pytest.MonkeyPatch, read: ReadRecipe, tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe = read(checkpoint__asynchronous=True, **changes)
    copied: list[int] = []
    real = BackgroundSave.copy

    def counted(self: BackgroundSave, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = real(self, tensors)
        copied.append(sum(tensor.nbytes for tensor in copies.values() if tensor.dim()))  # but for counts of steps
        return copies

    monkeypatch.setattr(BackgroundSave, "copy", counted)
    assert run_training(recipe, tmp_path / "run", WHERE, "fresh", StopRequest()) == 0
    plan = make_plan(recipe, place_of(recipe))
    assert plan.memory.saved_copy == sum(copied[-3:]) > 0
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    written = 0
    for file in checkpoint.glob("*.safetensors"):
        header = int.from_bytes(file.read_bytes()[:8], "little")
        described = json.loads(file.read_bytes()[8 : 8 + header])
        offsets = [one["data_offsets"] for one in described.values() if one.get("shape")]
        written += sum(end - start for start, end in offsets)
    assert plan.checkpoint_bytes == written
    assert plan.checkpoints_kept == 2 + 1 + 1  # the newest two, the best, and the one that is being written


def test_on_a_gpu_the_copy_is_in_the_memory_of_its_machine(read: ReadRecipe) -> None:
    recipe = read()
    gpu = Place(GPUS["h100"], False, 1, 1, "fp32", place_of(recipe).backend, 0.3)
    plan = make_plan(recipe, gpu)
    assert (plan.host_bytes, plan.memory.saved_copy) == (plan.checkpoint_bytes, 0)
    assert make_plan(read(checkpoint__asynchronous=False), gpu).host_bytes == 0
    alone = make_plan(recipe, place_of(recipe))  # auto is false on a CPU
    assert (alone.host_bytes, alone.memory.saved_copy) == (0, 0)


def test_ranks_of_a_divided_model_copy_their_parts(read: ReadRecipe) -> None:
    recipe = read(data__carry_state=True, training__rows_per_step=8)
    plan = make_plan(recipe, Place(GPUS["h100"], False, 4, 4, "fp32", place_of(recipe).backend, 0.3))
    states = 2 * state_bytes(recipe.model, 4)
    assert plan.host_bytes == plan.memory.weights + plan.memory.optimizer + states
    assert plan.host_bytes == checkpoint_bytes(recipe, "fp32", 4, 2)


def test_preferences_are_not_planned(read: ReadRecipe) -> None:
    recipe = read()
    from mambatrain.recipe.preference_section import PreferenceSection

    preferring = recipe.model_copy(update={"preferences": PreferenceSection()})
    with pytest.raises(UserError, match="learns from preferences"):
        make_plan(preferring, place_of(recipe))
