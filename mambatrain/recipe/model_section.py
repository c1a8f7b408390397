"""What the model is: every size of it, and how its parameters begin."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mambatrain.recipe.section import PositiveInt, Section


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
