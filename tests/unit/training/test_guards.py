import math

import pytest
import torch
from torch import nn

from mambatrain.data.training_order import TrainingOrder
from mambatrain.recipe import GuardsSection
from mambatrain.runs.checkpoint import Running
from mambatrain.training.guards import (
    find_fault,
    first_draw_not_skipped,
    name_gradients,
    refuse_endless_skipping,
    take_note,
)

GUARDS = GuardsSection(max_sigma=4.0, memory_draws=20)


@pytest.mark.parametrize(
    ("loss", "norm", "targets", "said"),
    [
        (math.nan, 1.0, 1, "loss is nan"),
        (math.inf, 1.0, 1, "loss is inf"),
        (1.0, math.nan, 1, "gradient norm is nan"),
        (1.0, math.inf, 1, "gradient norm is inf"),
        (0.0, 0.0, 0, "no target counts"),
    ],
)
def test_what_is_not_finite_is_a_fault(loss: float, norm: float, targets: int, said: str) -> None:
    assert said in (find_fault(loss, norm, targets, {}, GuardsSection()) or "")


def test_a_finite_step_is_none() -> None:
    assert find_fault(2.0, 0.5, 10, {}, GuardsSection()) is None


def running_over(losses: list[float], norms: list[float]) -> dict[str, Running]:
    running: dict[str, Running] = {}
    for loss, norm in zip(losses, norms, strict=True):
        take_note(running, loss, norm, GUARDS)
    return running


def test_mean_and_deviation_are_those_of_the_draws() -> None:
    losses = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    loss = running_over(losses, losses)["loss"]
    assert loss.mean == pytest.approx(float(torch.tensor(losses, dtype=torch.float64).mean()))
    assert loss.deviation == pytest.approx(float(torch.tensor(losses, dtype=torch.float64).std(correction=0)))


def test_old_draws_are_forgotten() -> None:
    running = running_over([9.0] * 20 + [1.0] * 200, [1.0] * 220)["loss"]
    assert running.mean == pytest.approx(1.0, abs=1e-2)
    assert running.count == 20


def test_a_draw_far_above_the_running_mean_is_a_fault() -> None:
    running = running_over([2.0, 2.2] * 5, [1.0, 3.0] * 5)  # means 2.1 and 2, deviations 0.1 and 1
    assert find_fault(2.49, 5.9, 1, running, GUARDS) is None
    assert find_fault(2.51, 2.0, 1, running, GUARDS) == "the loss is 2.51, 4.1 deviations above 2.1"
    assert find_fault(2.1, 6.1, 1, running, GUARDS) == "the gradient norm is 6.1, 4.1 deviations above 2"
    assert find_fault(0.0, 0.0, 1, running, GUARDS) is None, "far below is no fault"
    assert find_fault(9.0, 9.0, 1, running, GuardsSection()) is None, "without a limit there is none"


def test_there_is_no_limit_before_half_the_memory_is_full() -> None:
    assert find_fault(99.0, 1.0, 1, running_over([2.0, 2.2] * 4, [1.0] * 8), GUARDS) is None


def test_gradients_that_are_not_finite_are_named_else_the_largest() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(8)))
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full((1, 1), float(number))
    assert name_gradients(model) == [f"{number}.weight ({number})" for number in (7, 6, 5, 4, 3)]
    model[2].weight.grad = torch.full((1, 1), math.nan)
    assert name_gradients(model) == ["2.weight (nan)"]


def test_few_skipped_draws_do_not_end_a_run() -> None:
    refuse_endless_skipping(9, 4, "the loss is nan", [], TrainingOrder([], 0), GuardsSection())


def test_ranges_of_draws_are_passed_over() -> None:
    ranges = [[7, 9], [2, 3], [4, 4]]
    assert [first_draw_not_skipped(draw, ranges) for draw in range(11)] == [0, 1, 5, 5, 5, 5, 6, 10, 10, 10, 10]
