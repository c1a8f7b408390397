"""What a run is: every setting with its type, default, unit and meaning.

A recipe says *what* is trained. Where it runs (GPUs, kernels, run folder, tracker) is said on the command line.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mambatrain.recipe.adapter_section import AdapterSection
from mambatrain.recipe.data_section import DataSection, Stage, resolve_stages
from mambatrain.recipe.guards_section import GuardsSection
from mambatrain.recipe.optimizer_section import OptimizerSection, ScheduleSection
from mambatrain.recipe.parameter_section import ParameterSection
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


class ModelSection(Section):
    """The architecture; letters are the paper's (Mamba: arXiv 2312.00752, Mamba-2: arXiv 2405.21060)."""

    block: Literal["mamba1", "mamba2"] = "mamba1"
    """Which block every layer is."""
    d_model: PositiveInt
    """Width of the residual stream."""
    num_layers: PositiveInt
    """Number of blocks."""
    vocab_size: PositiveInt
    """Number of token ids the tokenizer may give."""
    pad_vocab_multiple: PositiveInt = 8
    """The embedding is padded to a multiple of this many rows, as mamba-ssm does; 1 pads nothing."""
    d_state: PositiveInt | Literal["auto"] = "auto"
    """N, the states per channel; auto: 16 for mamba1, 128 for mamba2."""
    d_conv: Annotated[int, Field(ge=2, le=4)] = 4
    """W, the width of the causal convolution."""
    expand: PositiveInt = 2
    """E / d_model, where E is the inner width."""
    dt_rank: PositiveInt | Literal["auto"] = "auto"
    """Mamba-1 only: rank of the projection to delta; auto: ceil(d_model / 16)."""
    head_dim: PositiveInt = 64
    """Mamba-2 only: P, the channels of a head."""
    num_groups: PositiveInt = 1
    """Mamba-2 only: G, groups of heads that share B and C."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""
    proj_bias: bool = False
    """Whether in_proj and out_proj have a bias."""
    tie_embeddings: bool = True
    """Whether the head is the embedding's matrix."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
    """Epsilon of every RMSNorm."""
    dt_min: Annotated[float, Field(gt=0.0)] = 0.001
    """Initial delta is log-uniform in [dt_min, dt_max]."""
    dt_max: Annotated[float, Field(gt=0.0)] = 0.1
    """See dt_min."""
    dt_init_floor: Annotated[float, Field(gt=0.0)] = 1e-4
    """Initial delta is at least this."""

    @model_validator(mode="after")
    def check_shapes(self) -> Self:
        if self.block == "mamba2":
            if self.d_inner % self.head_dim:
                raise ValueError(
                    f"expand * d_model = {self.d_inner} is not a multiple of head_dim {self.head_dim}; "
                    f"set model.head_dim to a divisor"
                )
            if self.num_heads % self.num_groups:
                raise ValueError(f"{self.num_heads} heads do not divide into num_groups {self.num_groups}")
            if "dt_rank" in self.model_fields_set and self.dt_rank != "auto":
                raise ValueError("dt_rank belongs to mamba1; remove it")
        else:
            for name in ("head_dim", "num_groups"):
                if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} belongs to mamba2; remove it")
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} is above dt_max {self.dt_max}")
        return self

    @property
    def d_inner(self) -> int:
        """E, the inner width."""
        return self.expand * self.d_model

    @property
    def state_size(self) -> int:
        """N with auto resolved."""
        if self.d_state == "auto":
            return 16 if self.block == "mamba1" else 128
        return self.d_state

    @property
    def dt_rank_size(self) -> int:
        """R with auto resolved (Mamba-1)."""
        return -(-self.d_model // 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def num_heads(self) -> int:
        """H, the heads of a Mamba-2 block."""
        return self.d_inner // self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """V, rows of the embedding."""
        return -(-self.vocab_size // self.pad_vocab_multiple) * self.pad_vocab_multiple

    @property
    def architecture(self) -> dict[str, object]:
        """What must be the same for weights to fit: auto and padding resolved; how they were initialised is no part."""
        own_to_block = {"num_groups": self.num_groups, "head_dim": self.head_dim}
        if self.block == "mamba1":
            own_to_block = {"dt_rank": self.dt_rank_size}
        common = (
            "block",
            "d_model",
            "num_layers",
            "d_conv",
            "expand",
            "conv_bias",
            "proj_bias",
            "tie_embeddings",
            "norm_eps",
        )
        return {
            **{name: getattr(self, name) for name in common},
            "d_state": self.state_size,
            **own_to_block,
            "padded vocabulary": self.padded_vocab_size,
        }


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
    activation_checkpointing: Literal["none", "every_block"] | Annotated[int, Field(ge=2)] = "none"
    """every_block: keep each block's input only and compute the rest again in the backward pass; k: every k-th's."""
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
        if self.trains_state and self.data.packing != "auto":
            raise ValueError(
                f"data.packing {self.data.packing} puts several documents in a row; with adapter.kind state each row "
                "holds one document, whatever the packing: leave it out"
            )
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
        """Every how many blocks one keeps its input only; 0: none does."""
        asked = self.training.activation_checkpointing
        return asked if isinstance(asked, int) else {"none": 0, "every_block": 1}[asked]

    @property
    def decay_steps(self) -> int:
        """Steps at the end in which a wsd schedule falls."""
        if self.schedule.decay_steps is not None:
            return self.schedule.decay_steps
        return max(1, round(self.schedule.decay_fraction * self.total_steps))
