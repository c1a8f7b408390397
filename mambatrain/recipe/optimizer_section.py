"""How gradients become updates, and how large these are as the training goes on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mambatrain.recipe.section import Fraction, PositiveInt, Section

MAX_NARROW_BETA = 0.99  # a moment kept in bf16 (8 significant bits) must be able to shrink


class OptimizerSection(Section):
    """What makes updates of gradients; which parameters decay is the model's parameter table's to say."""

    kind: Literal["adamw", "muon", "schedule_free"] = "adamw"
    """muon: of the blocks' projections, AdamW of the rest. schedule_free: AdamW whose average is what counts."""
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
    muon_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """muon only: decay of the momentum of the projections."""
    state_precision: Literal["full", "bf16", "8bit"] = "full"
    """adamw only: of the two moments. full: as the parameters; bf16: half the memory, betas of at most 0.99; 8bit: a
    quarter, on GPUs alone, by torchao (pip install 'mambatrain[8bit]'); not with --shard or fp64."""

    @model_validator(mode="after")
    def check_kind(self) -> Self:
        if self.kind != "muon" and self.muon_momentum != type(self).model_fields["muon_momentum"].default:
            raise ValueError(f"muon_momentum belongs to muon, not to {self.kind}; remove it")
        if self.kind == "schedule_free" and self.beta1 == 0.0:
            raise ValueError("beta1 0 leaves schedule_free no average to keep; 0.9 is usual")
        if self.state_precision != "full" and self.kind != "adamw":
            raise ValueError(f"state_precision {self.state_precision} belongs to adamw, not to {self.kind}")
        if self.state_precision == "bf16":
            for name in ("beta1", "beta2"):
                if getattr(self, name) > MAX_NARROW_BETA:
                    raise ValueError(
                        f"{name} {getattr(self, name)} needs moments of full precision: what shrinks by less than "
                        f"2^-8 a step rounds back in bf16; lower it to {MAX_NARROW_BETA}"
                    )
        return self


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
