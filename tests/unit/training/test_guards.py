import math

import pytest

from mambatrain.errors import UserError
from mambatrain.training.guards import MAX_SKIPPED_IN_A_ROW, find_fault, refuse_endless_skipping


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
    assert said in (find_fault(loss, norm, targets) or "")


def test_a_finite_step_is_none() -> None:
    assert find_fault(2.0, 0.5, 10) is None


def test_a_run_that_only_skips_ends() -> None:
    refuse_endless_skipping(MAX_SKIPPED_IN_A_ROW - 1, 4, "the loss is nan")
    with pytest.raises(UserError, match=r"draw 4.*the loss is nan"):
        refuse_endless_skipping(MAX_SKIPPED_IN_A_ROW, 4, "the loss is nan")
