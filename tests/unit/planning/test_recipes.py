"""What `plan` says of the shipped recipes: a change of a formula is seen here."""

from __future__ import annotations

import pytest

from mambatrain.planning.hardware import GPUS, native_on_gpus
from mambatrain.planning.plan import Place, make_plan
from mambatrain.recipe import read_recipe

GIB = 2**30


# At 30% of an H100's peak; GiB of one GPU at its fullest, hours, GiB sent by each GPU in a step.
@pytest.mark.parametrize(
    ("name", "gpus", "shards", "parameters", "steps", "memory", "hours", "sent"),
    [
        ("mamba2-370m", 1, 1, 368_346_624, 13_500, 11.9, 15.8, 0.0),
        ("mamba1-1.4b", 8, 1, 1_372_178_432, 50_000, 35.3, 25.4, 8.9),
        ("mamba2-7b", 512, 8, 7_285_403_648, 69_500, 59.6, 11.7, 54.2),
    ],
)
def test_a_recipe_costs_what_it_did(
    name: str, gpus: int, shards: int, parameters: int, steps: int, memory: float, hours: float, sent: float
) -> None:
    plan = make_plan(read_recipe(name), Place(GPUS["h100"], False, gpus, shards, "bf16", native_on_gpus(), 0.3))
    assert (plan.parameters["total"], plan.total_steps, plan.fits) == (parameters, steps, True)
    assert plan.memory.total / GIB == pytest.approx(memory, abs=0.05)
    assert plan.seconds / 3600 == pytest.approx(hours, abs=0.05)
    assert plan.sent_bytes_per_step / GIB == pytest.approx(sent, abs=0.05)
    # 6 FLOPs a parameter and token is the field's rule of thumb; the scan and the head that is only a lookup differ
    assert plan.flops_per_token == pytest.approx(6 * parameters, rel=0.15)


def test_what_does_not_fit_says_what_to_change() -> None:
    recipe = read_recipe("mamba2-370m", ["training.micro_batch_rows=32"])
    place = Place(GPUS["4090"], False, 1, 1, "bf16", native_on_gpus(), 0.3)
    plan = make_plan(recipe, place)
    assert not plan.fits
    assert plan.change is not None
    setting = plan.change.removeprefix("--set ")
    assert setting.startswith("training.micro_batch_rows=")
    assert make_plan(read_recipe("mamba2-370m", [setting]), place).fits
