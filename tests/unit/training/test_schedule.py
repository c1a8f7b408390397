from itertools import pairwise

import pytest

from mambatrain.errors import UserError
from mambatrain.recipe import Recipe, parse_recipe
from mambatrain.training.schedule import learning_rate_at


def recipe(**schedule: object) -> Recipe:
    return parse_recipe(
        {
            "model": {"d_model": 8, "num_layers": 1, "vocab_size": 16},
            "data": {"shards": "x", "row_tokens": 8},
            "training": {"rows_per_step": 1, "total_steps": 100},
            "optimizer": {"learning_rate": 1.0},
            "schedule": schedule,
        },
        origin="test",
    )


def test_warm_up_rises_linearly_from_the_first_update_to_the_peak() -> None:
    rates = [learning_rate_at(step, recipe(kind="cosine", warmup_steps=10)) for step in range(11)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0


def test_cosine_is_at_the_middle_half_way_and_at_the_floor_at_the_last_update() -> None:
    cosine = recipe(kind="cosine", warmup_steps=1, final_fraction=0.1)
    assert learning_rate_at(50, cosine) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate_at(99, cosine) == pytest.approx(0.1)


def test_linear_falls_along_a_straight_line_from_the_peak_to_the_floor() -> None:
    linear = recipe(kind="linear", warmup_steps=9, final_fraction=0.1)
    rates = [learning_rate_at(step, linear) for step in range(100)]
    assert rates[9] == 1.0
    assert rates[54] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[99] == pytest.approx(0.1)
    assert [a - b for a, b in pairwise(rates[9:])] == pytest.approx([0.01] * 90)


def test_the_decay_of_wsd_is_given_in_steps_too() -> None:
    wsd = recipe(kind="wsd", warmup_steps=0, decay_fraction=0.9, decay_steps=10, final_fraction=0.0)
    assert learning_rate_at(89, wsd) == 1.0
    assert learning_rate_at(94, wsd) == pytest.approx(0.5)
    assert learning_rate_at(99, wsd) == 0.0


@pytest.mark.parametrize(
    ("schedule", "said"),
    [({"kind": "cosine", "decay_steps": 3}, "belongs to wsd"), ({"kind": "wsd", "decay_steps": 101}, "exceeds 100")],
)
def test_a_decay_that_means_nothing_is_refused(schedule: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe(**schedule)


def test_wsd_is_stable_and_then_falls_linearly() -> None:
    wsd = recipe(kind="wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.0)
    assert {learning_rate_at(step, wsd) for step in range(10, 80)} == {1.0}
    assert learning_rate_at(89, wsd) == pytest.approx(0.5)
    assert learning_rate_at(99, wsd) == 0.0


def test_constant_stays() -> None:
    assert learning_rate_at(99, recipe(kind="constant", warmup_steps=0)) == 1.0


def test_a_warm_up_as_long_as_the_run_does_not_divide_by_zero() -> None:
    assert learning_rate_at(99, recipe(kind="cosine", warmup_steps=100)) == 1.0
