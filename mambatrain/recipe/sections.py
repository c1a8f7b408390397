"""What a run is: every setting with its type, default, unit and meaning.

A recipe says *what* is trained. Where it runs (GPUs, kernels, run folder, tracker) is said on the command line.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mambatrain.recipe.adapter_section import AdapterSection
from mambatrain.recipe.chat_section import PAIRS
from mambatrain.recipe.data_section import DataSection, Stage, resolve_stages
from mambatrain.recipe.guards_section import GuardsSection
from mambatrain.recipe.model_section import ModelSection
from mambatrain.recipe.optimizer_section import OptimizerSection, ScheduleSection
from mambatrain.recipe.parameter_section import ParameterSection
from mambatrain.recipe.preference_section import PreferenceSection
from mambatrain.recipe.section import PositiveInt, Section

__all__ = [
    "CheckpointSection",
    "EvaluationSection",
    "GuardsSection",
    "ModelSection",
    "OptimizerSection",
    "Recipe",
    "ScheduleSection",
    "Section",
    "TrainingSection",
]


class TrainingSection(Section):
    """How much at once and in total: give one of each pair, rows or tokens a step and steps or tokens in all."""

    rows_per_step: PositiveInt | None = None
    """Rows in one step, over all devices."""
    tokens_per_step: PositiveInt | None = None
    """Tokens in one step, over all devices; a multiple of data.row_tokens."""
    total_steps: PositiveInt | None = None
    """Steps in all."""
    total_tokens: PositiveInt | None = None
    """Tokens in all; rounded up to whole steps."""
    micro_batch_rows: PositiveInt | Literal["auto"] = "auto"
    """Rows a device holds at once; auto: chosen once from the device's memory, recorded, kept on resume."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Of matrix products. auto: bf16 where the machine has it in hardware, else fp32. Parameters stay fp32 (fp64)."""
    activation_checkpointing: Literal["none", "every_block", "auto"] | Annotated[int, Field(ge=2)] = "none"
    """every_block: keep each block's input only and compute the rest again in the backward pass; k: every k-th's; auto:
    as few as fit the device's memory, chosen once, recorded, kept on resume."""
    segment_tokens: PositiveInt | None = None
    """Longer rows go through the model in segments of so many tokens, state and gradients handed on: the activations of
    one are held at a time, and those of all others computed again in the backward pass. null: rows go through whole."""
    clip_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradients are scaled down to this norm."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the initial weights."""
    log_every_steps: PositiveInt = 1
    """The live line is refreshed at this interval; the JSON log has every step."""

    @model_validator(mode="after")
    def check_pairs(self) -> Self:
        for one, other in (("rows_per_step", "tokens_per_step"), ("total_steps", "total_tokens")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise ValueError(f"give exactly one of {one} and {other}; null unsets")
        return self


class EvaluationSection(Section):
    """Held-out loss during the run."""

    every_steps: PositiveInt = 500
    """Interval; step 0 and the last step are always evaluated."""
    max_tokens: PositiveInt = 500_000
    """Whole held-out documents up to this many tokens (at least one document)."""


class CheckpointSection(Section):
    """What is kept on disk."""

    every_steps: PositiveInt = 500
    """Interval; the last step is always saved."""
    keep_newest: PositiveInt = 2
    """Checkpoints kept, counted from the newest."""
    keep_best: bool = True
    """Also keep the one with the lowest held-out loss."""
    keep_every: PositiveInt | None = None
    """Also keep every k-th of those at the interval, for ever; null: none."""
    asynchronous: bool | Literal["auto"] = "auto"
    """true: training goes on while a copy in CPU memory is written (weights and optimizer state once more); auto: on a
    GPU, false on a CPU."""


class Recipe(Section):
    """One recipe gives one model on any machine."""

    about: str = ""
    """One line for `mambatrain recipes list`, and the source of the numbers."""
    model: ModelSection
    data: DataSection
    training: TrainingSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    guards: GuardsSection = GuardsSection()
    parameters: ParameterSection = ParameterSection()
    adapter: AdapterSection | None = None
    """`finetune`: train an adapter (LoRA, DoRA) or an initial state in place of the weights; null: the weights."""
    preferences: PreferenceSection | None = None
    """`finetune` on pairs (data.chats.format: preference): how they are learned from; null: the data is not pairs."""

    @model_validator(mode="after")
    def check_batch(self) -> Self:
        tokens, row = self.training.tokens_per_step, self.data.row_tokens
        if tokens is not None and tokens % row:
            raise ValueError(f"training.tokens_per_step {tokens} is not a multiple of data.row_tokens {row}")
        if self.schedule.warmup_steps is not None and self.schedule.warmup_steps > self.total_steps:
            raise ValueError(f"schedule.warmup_steps {self.schedule.warmup_steps} exceeds {self.total_steps} steps")
        if self.schedule.decay_steps is not None and self.schedule.decay_steps > self.total_steps:
            raise ValueError(f"schedule.decay_steps {self.schedule.decay_steps} exceeds {self.total_steps} steps")
        if self.optimizer.kind == "schedule_free" and self.schedule.kind != "constant":
            raise ValueError(f"schedule_free has no schedule: set schedule.kind to constant, not {self.schedule.kind}")
        if self.optimizer.state_precision == "8bit" and self.training.precision == "fp64":
            raise ValueError("optimizer.state_precision 8bit updates in fp32; with training.precision fp64 take full")
        segment, longest = self.training.segment_tokens, self.data.longest_row_tokens
        if segment is not None and segment >= longest:
            raise ValueError(f"training.segment_tokens {segment} does nothing for rows of {longest}; leave it out")
        stages = self.stages  # refuses what does not fit
        if tokens is None and any(stage.row_tokens != row for stage in stages):
            raise ValueError("data.stages with rows of another length need training.tokens_per_step, not rows_per_step")
        return self

    @model_validator(mode="after")
    def check_adapter(self) -> Self:
        if self.adapter is not None:
            self.adapter.check_model(self.model)
        if self.trains_state and self.optimizer.kind == "muon":
            raise ValueError("optimizer.kind muon moves matrices, and adapter.kind state trains none; take adamw")
        if self.adapter is not None and self.parameters != ParameterSection():
            raise ValueError("parameters (frozen, rates) is about training the weights; with an adapter leave it out")
        if self.trains_state and (self.data.packing != "auto" or self.data.carry_state):
            what = "carry_state" if self.data.carry_state else f"packing {self.data.packing}"
            raise ValueError(
                f"data.{what} does not go with adapter.kind state: each row holds one document, from its beginning"
            )
        return self

    @model_validator(mode="after")
    def check_preferences(self) -> Self:
        has_pairs = self.data.chats is not None and self.data.chats.format == PAIRS
        if self.preferences is None:
            if has_pairs:
                raise ValueError("data.chats.format preference needs a preferences section, as {beta: 0.1}")
            return self
        if not has_pairs:
            raise ValueError("preferences are learned from data.chats of format preference; name such files there")
        if self.trains_state:
            raise ValueError("adapter.kind state does not go with preferences: a row holds the two answers of a pair")
        if self.data.packing != "auto":
            raise ValueError("data.packing does not go with preferences: each row holds one pair; leave it out")
        if self.training.segment_tokens is not None:
            raise ValueError("training.segment_tokens does not go with preferences: a row holds two answers, whole")
        if self.data.held_out is not None:
            raise ValueError("data.held_out does not go with preferences: held-out pairs are measured; leave it out")
        return self

    @property
    def trains_state(self) -> bool:
        """Whether rows begin with a trained state, and so hold one document each."""
        return self.adapter is not None and self.adapter.kind == "state"

    @property
    def stages(self) -> list[Stage]:
        """What is drawn when; one stage where the recipe names none."""
        return resolve_stages(self.data, self.rows_per_step, self.total_steps)

    @property
    def rows_per_step(self) -> int:
        """Rows of data.row_tokens in one step over all devices; stages may have others."""
        if self.training.rows_per_step is not None:
            return self.training.rows_per_step
        assert self.training.tokens_per_step is not None  # check_pairs
        return self.training.tokens_per_step // self.data.row_tokens

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one step over all devices."""
        return self.rows_per_step * self.data.row_tokens

    @property
    def total_steps(self) -> int:
        """Steps in all."""
        if self.training.total_steps is not None:
            return self.training.total_steps
        assert self.training.total_tokens is not None  # check_pairs
        return -(-self.training.total_tokens // self.tokens_per_step)

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        if self.schedule.warmup_steps is not None:
            return self.schedule.warmup_steps
        return round(self.schedule.warmup_fraction * self.total_steps)

    @property
    def recompute_every(self) -> int:
        """Every how many blocks one keeps its input only; 0: none does. Of `auto` see `training/fitting.py`."""
        asked = self.training.activation_checkpointing
        return asked if isinstance(asked, int) else {"none": 0, "every_block": 1}[asked]

    def recomputing(self, every: int) -> Self:
        """The recipe with what `auto` came to in its place, as `recompute_every` counts."""
        settled = {0: "none", 1: "every_block"}.get(every, every)
        training = self.training.model_copy(update={"activation_checkpointing": settled})
        return self.model_copy(update={"training": training})

    @property
    def decay_steps(self) -> int:
        """Steps at the end in which a wsd schedule falls."""
        if self.schedule.decay_steps is not None:
            return self.schedule.decay_steps
        return max(1, round(self.schedule.decay_fraction * self.total_steps))
