"""Each optimizer does what its paper says, on the parameters that are its own, and goes on exactly."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mambatrain.adapters.trained import whole_model
from mambatrain.data.training_data import open_training_data
from mambatrain.devices import end_processes
from mambatrain.errors import UserError
from mambatrain.evaluation.held_out import measure_held_out
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection, OptimizerSection, Recipe, read_recipe
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.runs.folder import read_log
from mambatrain.training.assemble import Where
from mambatrain.training.narrow_adamw import NarrowAdamW
from mambatrain.training.optimizer import build_optimizers, optimizer_tensors
from mambatrain.training.schedule_free import ScheduleFreeAdamW, evaluated_weights
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "bf16": {"optimizer__state_precision": "bf16"},
    "muon": {"optimizer__kind": "muon"},
    "schedule_free": {"optimizer__kind": "schedule_free", "schedule": {"kind": "constant", "warmup_steps": 3}},
}


def tiny_model(block: str, **changes: Any) -> LanguageModel:
    section = ModelSection(
        block=block, d_model=16, num_layers=2, vocab_size=32, head_dim=8 if block == "mamba2" else 64
    )
    section = section.model_copy(update=changes)
    model = LanguageModel(section, choose_backend("torch", torch.device("cpu")))
    initialise(model, section, seed=0)
    return model


def fill_gradients(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("block", "matrices"),
    [("mamba1", {"in_proj", "x_proj", "dt_proj", "out_proj"}), ("mamba2", {"in_proj", "out_proj"})],
)
def test_muon_has_the_projections_and_nothing_else(block: str, matrices: set[str], tied: bool) -> None:
    model = tiny_model(block, tie_embeddings=tied)
    adamw, muon = build_optimizers(whole_model(model), OptimizerSection(kind="muon", learning_rate=0.1))
    owned = [{id(p) for group in part.param_groups for p in group["params"]} for part in (adamw, muon)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert owned[0] | owned[1] == set(names)
    assert not owned[0] & owned[1]
    expected = {f"layers.{layer}.mixer.{name}.weight" for layer in range(2) for name in matrices}
    assert {names[parameter] for parameter in owned[1]} == expected
    assert {group["weight_decay"] for group in muon.param_groups} == {0.1}


def test_an_update_of_muon_is_nearly_orthogonal_and_as_large_as_one_of_adamw() -> None:
    model = tiny_model("mamba1")
    fill_gradients(model)
    before = model.layers[0].mixer.in_proj.weight.detach().clone()
    for optimizer in build_optimizers(
        whole_model(model), OptimizerSection(kind="muon", learning_rate=0.5, weight_decay=0.0)
    ):
        optimizer.step()
    update = (model.layers[0].mixer.in_proj.weight.detach() - before) / 0.5  # (64, 16)
    spread = torch.linalg.svdvals(update) / (0.2 * math.sqrt(64))
    assert 0.5 < float(spread.min()) <= float(spread.max()) < 1.5
    assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=0.3)


def test_moments_in_bf16_are_those_of_adamw_rounded_behind_each_update() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    optimizer = NarrowAdamW([{"params": [parameter], "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    expected, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, 31):
        gradient = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        expected -= 0.01 * 0.1 * expected
        expected -= 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        m, v = m.bfloat16().double(), v.bfloat16().double()
    assert torch.allclose(parameter.detach(), expected, rtol=1e-12, atol=1e-12)
    assert {optimizer.state[parameter][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}


def test_schedule_free_follows_the_three_sequences_of_its_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    optimizer = ScheduleFreeAdamW([{"params": [parameter], "weight_decay": 0.1}], 0.0, betas=(0.9, 0.95), eps=1e-8)
    x, z, v, squares = start.clone(), start.clone(), torch.zeros_like(start), 0.0
    for step in range(1, 31):
        rate = 0.01 * min(1.0, step / 10)
        optimizer.param_groups[0]["lr"] = rate
        y = 0.1 * z + 0.9 * x
        assert torch.allclose(parameter.detach(), y, rtol=1e-11, atol=1e-11)
        gradient = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.clone()
        optimizer.step()
        v = 0.95 * v + 0.05 * gradient**2
        z = z - rate * (gradient / ((v / (1 - 0.95**step)).sqrt() + 1e-8) + 0.1 * y)
        squares += rate**2
        x = (1 - rate**2 / squares) * x + rate**2 / squares * z
    trained = parameter.detach().clone()
    with evaluated_weights([optimizer]):
        assert torch.allclose(parameter.detach(), x, rtol=1e-11, atol=1e-11)
    assert torch.equal(parameter.detach(), trained), "looking at the average has changed what is trained"


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[[Recipe], Path]]:
    def once(recipe: Recipe) -> Path:
        where = Where(device="cpu", kernels="torch", quiet=True)
        assert run_training(recipe, tmp_path / "run", where, "if-possible", StopRequest()) == 0
        return tmp_path / "run"

    yield once
    end_processes()


def files_of(checkpoint: Path) -> list[bytes]:
    return [
        (checkpoint / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors", "progress.json")
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_it_is_the_run_that_never_stopped_to_the_bit(
    kind: str, write_tiny_recipe: Callable[..., Path], train: Callable[[Recipe], Path]
) -> None:
    recipe = read_recipe(str(write_tiny_recipe(checkpoint__keep_newest=9, **KINDS[kind])))
    run = train(recipe)
    whole = files_of(list_checkpoints(run)[-1])
    for checkpoint in list_checkpoints(run)[1:]:
        shutil.rmtree(checkpoint)
    assert files_of(list_checkpoints(train(recipe))[-1]) == whole


def test_schedule_free_evaluates_and_saves_its_average(
    write_tiny_recipe: Callable[..., Path], train: Callable[[Recipe], Path]
) -> None:
    recipe = read_recipe(str(write_tiny_recipe(**KINDS["schedule_free"])))
    run = train(recipe)
    logged = [line["held_out_loss"] for line in read_log(run / "log.jsonl") if line["event"] == "held_out"][-1]
    checkpoint, held_out = list_checkpoints(run)[-1], open_training_data(recipe).held_out
    assert held_out is not None
    model = LanguageModel(recipe.model, choose_backend("torch", torch.device("cpu")))

    def loss_of(tensors: dict[str, Tensor]) -> float:
        model.load_state_dict(tensors)
        return measure_held_out(model, held_out.micro_batches(4, 0, 1), None).nats_per_token

    state = load_file(checkpoint / "optimizer.safetensors")
    trained = {name.removesuffix(".trained"): value for name, value in state.items() if name.endswith(".trained")}
    assert loss_of(load_file(checkpoint / "model.safetensors")) == pytest.approx(logged, rel=1e-6)
    assert abs(loss_of(trained) - logged) > 1e-3


def test_bf16_moments_take_half_of_a_checkpoint_s_optimizer_file() -> None:
    model, sizes = tiny_model("mamba1"), {}
    for precision in ("full", "bf16"):
        section = OptimizerSection.model_validate({"learning_rate": 0.1, "state_precision": precision})
        optimizers = build_optimizers(whole_model(model), section)
        fill_gradients(model)
        for optimizer in optimizers:
            optimizer.step()
        tensors = optimizer_tensors(optimizers, whole_model(model))
        sizes[precision] = sum(value.numel() * value.element_size() for value in tensors.values() if value.ndim)
    assert sizes["bf16"] * 2 == sizes["full"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer__beta2": 0.999, "optimizer__state_precision": "bf16"}, r"beta2 0.999 needs moments of full"),
        ({"optimizer__kind": "muon", "optimizer__state_precision": "bf16"}, "bf16 belongs to adamw"),
        ({"optimizer__muon_momentum": 0.9}, "muon_momentum belongs to muon"),
        ({"optimizer__kind": "schedule_free"}, "set schedule.kind to constant, not cosine"),
        ({"optimizer__state_precision": "int8"}, "optimizer.state_precision"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    changes: dict[str, Any], said: str, write_tiny_recipe: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=said):
        read_recipe(str(write_tiny_recipe(**changes)))
