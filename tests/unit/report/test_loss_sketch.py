"""The loss in characters."""

from __future__ import annotations

from mambatrain.report.loss_sketch import sketch_loss


def test_a_falling_loss_falls_from_the_highest_level_to_the_lowest() -> None:
    lines = sketch_loss([4.0, 3.0, 2.0, 1.0], height=2)
    assert lines == ["4.000 █▃  ", "1.000 ██▆▁"]


def test_long_runs_are_drawn_as_means_and_what_is_not_finite_is_left_out() -> None:
    lines = sketch_loss([2.0, 4.0, float("nan"), 1.0, 1.0], width=2, height=1)
    assert lines == ["1.000 █▁"]
    assert len(sketch_loss([1.0] * 1000)[0]) == len("1.000 ") + 64
    assert sketch_loss([]) == []
