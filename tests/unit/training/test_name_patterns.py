"""Parameters chosen by name: what stays frozen does not move, what has a rate of its own moves at it."""

from __future__ import annotations

import pytest
import torch

from mambatrain.adapters.trained import whole_model
from mambatrain.errors import UserError
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise, parameter_shapes
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection, OptimizerSection
from mambatrain.recipe.parameter_section import ParameterSection
from mambatrain.training.name_patterns import freeze_parameters, matching_names, rates_of
from mambatrain.training.optimizer import (
    Optimizers,
    build_optimizers,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)

MODEL = ModelSection(d_model=16, num_layers=2, vocab_size=32, d_state=4)
NAMES = list(parameter_shapes(MODEL))


def section(*frozen: str, rates: tuple[tuple[list[str], float], ...] = ()) -> ParameterSection:
    return ParameterSection.model_validate(
        {"frozen": list(frozen), "rates": [{"match": match, "times": times} for match, times in rates]}
    )


@pytest.fixture(params=["mamba1", "mamba2"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    shape = {"block": request.param, "d_model": 16, "num_layers": 2, "vocab_size": 32, "d_state": 4}
    if request.param == "mamba2":
        shape["head_dim"] = 8
    made = ModelSection(**shape)
    model = LanguageModel(made, choose_backend("auto", torch.device("cpu")))
    initialise(model, made, seed=1)
    return model


def take_a_step(model: LanguageModel, optimizers: Optimizers, rate: float) -> dict[str, torch.Tensor]:
    """How far each parameter moved."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    tokens = torch.arange(64).reshape(2, 32) % 32
    set_learning_rate(optimizers, rate)
    model.summed_loss(tokens, None, tokens.roll(1)).backward()
    for optimizer in optimizers:
        optimizer.step()
    return {name: (value.detach() - before[name]).abs().max() for name, value in model.named_parameters()}


@pytest.mark.parametrize("frozen", [["embedding.weight"], ["layers.0.*"], ["*.A_log", "*.D", "*dt_*bias"]])
def test_what_is_frozen_does_not_move_and_all_else_does(model: LanguageModel, frozen: list[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    choice = section(*frozen)
    still = set(matching_names(frozen, names, "frozen"))
    assert 0 < len(still) < len(names)
    freeze_parameters(model, choice)
    optimizers = build_optimizers(whole_model(model), OptimizerSection(learning_rate=0.1), choice)
    moved = take_a_step(model, optimizers, 0.1)
    assert {name for name, distance in moved.items() if distance == 0} == still
    tensors = optimizer_tensors(optimizers, whole_model(model))
    assert {key.rsplit(".", 1)[0] for key in tensors} == set(names) - still
    again = build_optimizers(whole_model(model), OptimizerSection(learning_rate=0.1), choice)
    restore_optimizer(again, whole_model(model), tensors)
    assert optimizer_tensors(again, whole_model(model)).keys() == tensors.keys()


def test_a_group_moves_at_its_own_rate(model: LanguageModel) -> None:
    choice = section(rates=((["layers.0.*"], 0.25), (["norm_f.weight"], 0.5)))
    optimizers = build_optimizers(
        whole_model(model), OptimizerSection(learning_rate=0.1, weight_decay=0.0, eps=1e-30), choice
    )
    moved = take_a_step(model, optimizers, 0.01)
    for name, distance in moved.items():  # Adam's first step is the rate itself, whatever the gradient
        times = 0.25 if name.startswith("layers.0.") else 0.5 if name == "norm_f.weight" else 1.0
        assert float(distance) == pytest.approx(0.01 * times, rel=1e-3)
    assert sum(len(group["params"]) for one in optimizers for group in one.param_groups) == len(moved)


def test_muon_and_adamw_share_what_is_left(model: LanguageModel) -> None:
    names = [name for name, _ in model.named_parameters()]
    choice = section("layers.0.*", rates=((["layers.1.mixer.in_proj.weight", "norm_f.weight"], 0.5),))
    freeze_parameters(model, choice)
    optimizers = build_optimizers(whole_model(model), OptimizerSection(kind="muon", learning_rate=0.1), choice)
    assert len(optimizers) == 2
    moved = take_a_step(model, optimizers, 0.1)
    assert {name for name in names if moved[name] == 0} == {name for name in names if name.startswith("layers.0.")}
    rates = {id(value): group["lr"] for one in optimizers for group in one.param_groups for value in group["params"]}
    of_name = {name: rates[id(value)] for name, value in model.named_parameters() if id(value) in rates}
    assert {name for name, rate in of_name.items() if rate == pytest.approx(0.05)} == set(choice.rates[0].match)


@pytest.mark.parametrize(
    ("choice", "problem", "hint"),
    [
        (section("layer.0.*"), "parameters.frozen: no parameter fits layer.0.*", "did you mean layers.0.*?"),
        (section("*.A_logs"), "no parameter fits *.A_logs", "did you mean *.A_log?"),
        (section("embeding.weight"), "no parameter fits embeding.weight", "did you mean embedding.weight?"),
        (section("zzzzzz"), "no parameter fits zzzzzz", "one of embedding.weight"),
        (section("*"), "leaves nothing to train", "fewer"),
        (section(rates=((["x_prj"], 0.1),)), "parameters.rates.0.match: no parameter fits x_prj", "*.x_proj.*"),
        (
            section(rates=((["*.D"], 0.1), (["layers.0.*"], 0.2))),
            "names layers.0.mixer.D, which is in an entry",
            "once",
        ),
        (section("*.D", rates=((["layers.0.*"], 0.2),)), "names layers.0.mixer.D, which is frozen", "once"),
    ],
)
def test_a_pattern_that_fits_nothing_or_twice_is_refused(choice: ParameterSection, problem: str, hint: str) -> None:
    with pytest.raises(UserError) as told:
        rates_of(choice, NAMES)
    assert problem in told.value.message and hint in str(told.value.hint)
