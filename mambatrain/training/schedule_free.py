"""AdamW without a schedule (Defazio et al., "The Road Less Scheduled", arXiv 2405.15682, algorithm 1).

Three sequences of weights, of which two are kept:

    y = (1 - beta1) z + beta1 x        where gradients are taken: the *trained* weights, in the model while it trains
    z' = z - rate (g / (sqrt(v) + eps) + weight_decay y)
    x' = (1 - c) x + c z',  c = rate^2 / sum of rate^2      the *average*: what is evaluated, saved and exported

x is never kept: it is (y - (1 - beta1) z) / beta1. That rounds, so while x stands in the model, y is put aside and not
computed back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TRAINED = "trained"  # the field of a parameter's state that holds y while x is in the model, and in checkpoints


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """The parameters are y; the state of each is z, v, the number of updates and the sum of squared rates."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, y: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), rate = self.state[y], group["betas"], group["lr"]
        if not state:
            state["z"], state["exp_avg_sq"] = y.clone(), torch.zeros_like(y)
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["sum_of_squared_rates"] = torch.zeros((), dtype=torch.float64)
        assert y.grad is not None
        z, v = state["z"], state["exp_avg_sq"]
        state["step"] += 1
        state["sum_of_squared_rates"] += rate * rate
        c = rate * rate / float(state["sum_of_squared_rates"])
        v.mul_(beta2).addcmul_(y.grad, y.grad, value=1 - beta2)
        denominator = (v / (1 - beta2 ** float(state["step"]))).sqrt_().add_(group["eps"])
        direction = (y.grad / denominator).add_(y, alpha=group["weight_decay"])
        # y' = (1 - beta1) z' + beta1 x', with x and z' put in
        y.lerp_(z, c).sub_(direction, alpha=rate * (1 - beta1 * (1 - c)))
        z.sub_(direction, alpha=rate)

    @torch.no_grad()
    def go_to_average(self) -> None:
        """x into the model, y aside."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if state := self.state.get(parameter):
                    state[TRAINED] = parameter.clone()
                    parameter.lerp_(state["z"], 1 - 1 / group["betas"][0])

    @torch.no_grad()
    def return_to_trained(self) -> None:
        """y back into the model, as it was."""
        for parameter, state in self.state.items():
            if TRAINED in state:
                parameter.copy_(state.pop(TRAINED))


@contextmanager
def evaluated_weights(optimizers: Any) -> Iterator[None]:
    """Within, the model holds what is evaluated, saved and exported: the average, where an optimizer keeps one."""
    averaging = [optimizer for optimizer in optimizers if isinstance(optimizer, ScheduleFreeAdamW)]
    for optimizer in averaging:
        optimizer.go_to_average()
    try:
        yield
    finally:
        for optimizer in averaging:
            optimizer.return_to_trained()
