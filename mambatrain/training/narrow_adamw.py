"""AdamW whose two moments are kept in bf16: 4 bytes a parameter in place of 8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class NarrowAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) on moments that are widened for the update and rounded to nearest behind it.

    One parameter's moments are wide at a time. bf16 has 8 significant bits, so a moment that decays by less than 2^-8
    of itself would round back to what it was and stay for ever: betas above 0.99 are refused by the recipe.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        first, second = (state[moment].to(parameter.dtype) for moment in ("exp_avg", "exp_avg_sq"))
        assert parameter.grad is not None
        adamw(
            [parameter],
            [parameter.grad],
            [first],
            [second],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
