"""AdamW whose two moments are kept in 8 bits, by torchao: a little more than 2 bytes a parameter in place of 8."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambatrain.errors import UserError

if TYPE_CHECKING:
    from mambatrain.recipe import Recipe

BLOCK_NUMBERS = 256
"""Neighbouring numbers that have one fp32 scale, the largest magnitude among them."""
MIN_NUMBERS = 4096  # of a tensor in 8 bits; torchao's rule and bitsandbytes', for small ones are the touchy ones


def is_kept_in_eight_bits(num_numbers: int) -> bool:
    """Whether a tensor of so many numbers has its moments in 8 bits; fp32 otherwise."""
    return num_numbers >= MIN_NUMBERS and num_numbers % BLOCK_NUMBERS == 0


def moment_bytes(num_numbers: int) -> int:
    """What one moment of a tensor takes: codes and scales, or fp32."""
    if is_kept_in_eight_bits(num_numbers):
        return num_numbers + 4 * (num_numbers // BLOCK_NUMBERS)
    return 4 * num_numbers


def refuse_eight_bit(recipe: Recipe, device: torch.device) -> None:
    """
    Raises:
        UserError: the recipe asks for a state in 8 bits on a CPU, or without torchao.
    """
    if recipe.optimizer.state_precision != "8bit":
        return
    if device.type == "cpu":
        raise UserError(
            "optimizer.state_precision 8bit is for GPUs: on a CPU its update compiles for half a minute at each start",
            "--set optimizer.state_precision=bf16: 4 bytes a parameter, on any device (plan: say for which --gpu)",
        )
    import_torchao()


class EightBitAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with the block-wise 8-bit moments of arXiv 2110.02861.

    torchao widens a tensor's moments, updates by them, and rounds them to the nearest of 256 values times the largest
    of their block, in one compiled function. Codes and scales are plain tensors here, and torchao's own tensor is put
    around them for the update alone: so a checkpoint holds nothing else, and the tables of 256 values are there once.
    Parameters are fp32, contiguous and whole.

    Raises:
        UserError: torchao is not installed, or of another version.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        update, self._wrap = import_torchao()
        # Each shape is compiled once: none of its arguments but tensors changes from step to step.
        self._update: Any = torch.compile(update, fullgraph=True, dynamic=False)
        # What the compiler advises: a hash that torchao's tensor has not, and TF32, which is for matrix products.
        warnings.filterwarnings("ignore", message="OptimState8bit does not implement _stable_hash_for_caching")
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        self._tables: dict[tuple[torch.device, bool], Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        with torch._dynamo.utils.disable_cache_limit():  # there are more shapes than its 8
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_first_state(parameter))
        assert parameter.grad is not None
        self._update(
            parameter.detach(),
            parameter.grad,
            state["step"].add_(1),
            self._moment(state, "exp_avg", signed=True),
            self._moment(state, "exp_avg_sq", signed=False),
            None,
            # a number would be compiled in, and this one changes; on the device without a copy to it
            torch.full((), group["lr"], dtype=torch.float32, device=parameter.device),
            *group["betas"],
            group["weight_decay"],
            group["eps"],
            True,  # decoupled decay
            False,  # no random rounding: parameters are fp32
        )

    def _moment(self, state: dict[str, Tensor], name: str, signed: bool) -> Tensor:
        if name in state:
            return state[name]
        codes, scales = state[f"{name}_codes"], state[f"{name}_scales"]
        wrapped: Tensor = self._wrap(codes, scales, self._table(codes.device, signed), signed, torch.float32)
        return wrapped

    def _table(self, device: torch.device, signed: bool) -> Tensor:
        from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

        if (device, signed) not in self._tables:
            values = get_qmap_signed() if signed else get_qmap_unsigned()
            self._tables[device, signed] = torch.tensor(values, dtype=torch.float32, device=device)
        return self._tables[device, signed]


def _first_state(parameter: Tensor) -> dict[str, Tensor]:
    """Codes and scales of 0 stand for moments of 0."""
    state = {"step": torch.zeros((), device=parameter.device)}
    for moment in ("exp_avg", "exp_avg_sq"):
        if is_kept_in_eight_bits(parameter.numel()):
            state[f"{moment}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
            scales = parameter.numel() // BLOCK_NUMBERS
            state[f"{moment}_scales"] = torch.zeros(scales, device=parameter.device)
        else:
            state[moment] = torch.zeros_like(parameter)
    return state


def import_torchao() -> tuple[Any, Any]:
    """Its update of one parameter, and its tensor of codes, scales and table.

    Raises:
        UserError: it is not installed, or has them elsewhere.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it tells of kernels for other things that it could not load
    try:
        from torchao.optim.adam import single_param_adam
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise UserError(
            f"optimizer.state_precision 8bit needs torchao: {error}", "pip install 'mambatrain[8bit]'"
        ) from None
    finally:
        logging.disable(before)
    return single_param_adam, OptimState8bit
