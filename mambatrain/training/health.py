"""Whether the layers still have a memory: what each does with a row of the draw in hand.

A channel keeps exp(dt A) of its state from one token to the next. Where that is near 0 for all channels and tokens, a
layer has forgotten how to remember; where dt is near 0 for all of them, nothing is ever written.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mambatrain.models.language_model import Layer
from mambatrain.ops.reference import computing_dtype

if TYPE_CHECKING:
    from mambatrain.models.language_model import LanguageModel
    from mambatrain.training.training_run import Draw, TrainingRun

COLLAPSED_DECAY = 0.01  # less than a hundredth of the state reaches the next token, in no channel more
SATURATED_STEP = 1e-4  # the smallest dt that initialisation gives (dt_init_floor): nothing is trained to be below it


@dataclass(frozen=True)
class LayerHealth:
    """One layer over one row. Floats that are not finite are None: NaN is not JSON."""

    dt_min: float | None
    dt_max: float | None
    decay_min: float | None
    """exp(dt A), over all tokens, channels and states."""
    decay_max: float | None
    state_norm: float | None
    """Root mean square of the state behind the row."""
    gradient_norm: float | None
    """Of the layer's parameters over the whole step, before clipping."""

    @property
    def warning(self) -> str | None:
        """What is wrong with its memory."""
        if self.decay_max is not None and self.decay_max < COLLAPSED_DECAY:
            return f"its memory has collapsed: at most {self.decay_max:.2g} of the state outlives a token"
        if self.dt_max is not None and self.dt_max < SATURATED_STEP:
            return f"its memory is saturated: no token is written, the largest dt is {self.dt_max:.2g}"
        return None


def health_is_due(run: TrainingRun) -> bool:
    """Before an update, at every `guards.health_every_steps`."""
    every = run.recipe.guards.health_every_steps
    return every is not None and run.progress.step % every == 0


def write_health(run: TrainingRun, draw: Draw) -> None:
    """The health line of the draw in hand, before its update: rank 0 looks at its first row while the others go on."""
    progress, order = run.progress, run.order
    progress.log_lines += 1
    if not run.accelerator.is_main_process:
        return
    num_rows = order.stages[order.stage_of(progress.draw)].rows_per_step
    row = order.micro_batches(progress.draw, 1, rank=0, num_ranks=num_rows)[0].to(run.accelerator.device)
    first = slice(run.recipe.training.segment_tokens)  # all of it, or its first segment
    clipping = min(1.0, run.recipe.training.clip_norm / (draw.gradient_norm + 1e-6))  # as torch has it
    with run.accelerator.autocast():
        layers = measure_health(run.objective.model, row.tokens[:, first], row.boundaries[:, first], clipping)
    warnings = {number: layer.warning for number, layer in enumerate(layers) if layer.warning is not None}
    for number, warning in warnings.items():
        run.reporter.say(f"step {progress.step:,}: layer {number}: {warning}")
    run.reporter.write_event(
        {
            "event": "health",
            "step": progress.step,
            "draw": progress.draw,
            "layers": [asdict(layer) for layer in layers],
            "warnings": [f"layer {number}: {warning}" for number, warning in warnings.items()],
        }
    )


@torch.no_grad()
def measure_health(
    model: LanguageModel, tokens: Tensor, boundaries: Tensor, clipping: float = 1.0
) -> list[LayerHealth]:
    """Each layer's, over rows (B, L) of tokens; gradients are those that the parameters hold, divided by `clipping`."""
    residual = model.embedding(tokens)
    residual = residual.to(computing_dtype(residual))  # (B, L, d_model)
    found = []
    for module in model.layers:
        layer = cast(Layer, module)
        dt = layer.step_sizes(residual, boundaries).flatten(0, 1)  # (B L, channels)
        rates = -torch.exp(layer.mixer.A_log).view(dt.shape[1], -1)  # A: (channels, states)
        residual, state = layer(residual, boundaries)
        squares = [parameter.grad.square().sum() for parameter in layer.parameters() if parameter.grad is not None]
        found.append(
            LayerHealth(
                dt_min=_finite(dt.min()),
                dt_max=_finite(dt.max()),
                decay_min=_finite((dt.amax(0)[:, None] * rates).min().exp()),
                decay_max=_finite((dt.amin(0)[:, None] * rates).max().exp()),
                state_norm=_finite(state.ssm.square().mean().sqrt()),
                gradient_norm=_finite(torch.stack(squares).sum().sqrt() / clipping) if squares else None,
            )
        )
    return found


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
