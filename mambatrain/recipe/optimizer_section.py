"""How gradients become updates, and how large these are as the training goes on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mambatrain.recipe.section import Fraction, PositiveInt, Section


class OptimizerSection(Section):
    """AdamW; which parameters decay is the model's parameter table's to say."""

    kind: Literal["adamw"] = "adamw"
    """The only one so far."""
    learning_rate: Annotated[float, Field(gt=0.0)]
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled; applied to projections and embedding alone."""


class ScheduleSection(Section):
    """The learning rate as a function of the step."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """All begin with a warm-up. cosine, linear: then down; wsd: stable, then linearly down; constant: as it is."""
    warmup_fraction: Fraction = 0.05
    """Fraction of all steps in which the rate rises linearly from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The same in steps; wins over warmup_fraction."""
    decay_fraction: Fraction = 0.2
    """wsd only: fraction of all steps in which the rate falls."""
    decay_steps: PositiveInt | None = None
    """wsd only: the same in steps; wins over decay_fraction."""
    final_fraction: Fraction = 0.05
    """The last rate over the peak rate."""

    @model_validator(mode="after")
    def check_decay(self) -> Self:
        if self.decay_steps is not None and self.kind != "wsd":
            raise ValueError(f"decay_steps belongs to wsd, not to {self.kind}; remove it")
        return self
