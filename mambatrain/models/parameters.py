"""What is true of every parameter, in one table: shape, weight decay, precision, initialisation.

Optimizer groups, casting, counts, the check of foreign weights and the docs all read it. The initialisation is
mamba-ssm's (its `Mamba`, `Mamba2` and `MambaLMHeadModel`, version 2.2).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mambatrain.recipe import ModelSection


Fill = Callable[[Tensor, "ModelSection", torch.Generator], object]
Shape = Callable[["ModelSection"], tuple[int, ...]]


@dataclass(frozen=True)
class ParameterRow:
    """One line of the table."""

    shape: Shape
    decays: bool
    """Whether weight decay applies."""
    keeps_fp32: bool
    """Whether it stays fp32 (fp64 in an fp64 model) under every precision; the blocks assert it."""
    initialisation: str
    """In words."""
    fill: Fill
    """Fills an fp32 CPU tensor, drawing from the generator."""
    exists: Callable[[ModelSection], bool] = lambda section: True
    is_matrix: bool = False
    """Whether it is a projection inside a block, for Muon to orthogonalise; Mamba-1's `A_log` is 2-D and is none."""


def _fill_by_fan_in(tensor: Tensor, section: ModelSection, generator: torch.Generator) -> None:
    """PyTorch's default for Linear and Conv1d, kaiming_uniform(a=sqrt 5): the bound is fan_in^-1/2.

    The last dimension is the fan-in of a Linear (out, in) and of a depthwise convolution (D, 1, W).
    """
    bound = tensor.shape[-1] ** -0.5
    tensor.uniform_(-bound, bound, generator=generator)


def _fill_out_proj(tensor: Tensor, section: ModelSection, generator: torch.Generator) -> None:
    """GPT-2's rule: every block adds to the residual stream, so each writes num_layers^-1/2 as much."""
    _fill_by_fan_in(tensor, section, generator)
    tensor.div_(math.sqrt(section.num_layers))


def _fill_conv_bias(tensor: Tensor, section: ModelSection, generator: torch.Generator) -> None:
    bound = section.d_conv**-0.5
    tensor.uniform_(-bound, bound, generator=generator)


def _fill_dt_bias(tensor: Tensor, section: ModelSection, generator: torch.Generator) -> None:
    """The b for which softplus(b) = delta, with delta log-uniform: b = delta + log(1 - exp(-delta))."""
    low, high = math.log(section.dt_min), math.log(section.dt_max)
    delta = tensor.uniform_(generator=generator).mul_(high - low).add_(low).exp_().clamp_(min=section.dt_init_floor)
    tensor.copy_(delta + torch.log(-torch.expm1(-delta)))


def _fill_spectrum(tensor: Tensor, section: ModelSection, generator: torch.Generator) -> None:
    tensor.copy_(torch.arange(1, section.state_size + 1, dtype=tensor.dtype).log())  # the S4D-real spectrum


def _fill_head_rates(tensor: Tensor, section: ModelSection, generator: torch.Generator) -> None:
    tensor.uniform_(1.0, 16.0, generator=generator).log_()


def _fill_embedding(tensor: Tensor, section: ModelSection, generator: torch.Generator) -> None:
    tensor.normal_(std=0.02, generator=generator)


def _projection(shape: Shape) -> ParameterRow:
    return ParameterRow(shape, True, False, "U(+-fan_in^-1/2)", _fill_by_fan_in, is_matrix=True)


def _proj_bias(shape: Shape) -> ParameterRow:
    return ParameterRow(shape, False, False, "0", lambda t, s, g: t.zero_(), lambda s: s.proj_bias)


def _ones(shape: Shape) -> ParameterRow:
    return ParameterRow(shape, False, True, "1", lambda t, s, g: t.fill_(1.0))


def _dt_bias(shape: Shape) -> ParameterRow:
    words = "inverse softplus of log-uniform [dt_min, dt_max], at least dt_init_floor"
    return ParameterRow(shape, False, True, words, _fill_dt_bias)


def _out_proj() -> ParameterRow:
    words = "U(+-fan_in^-1/2) / sqrt(num_layers)"
    return ParameterRow(lambda s: (s.d_model, s.d_inner), True, False, words, _fill_out_proj, is_matrix=True)


def _convolution(channels: Callable[[ModelSection], int]) -> dict[str, ParameterRow]:
    words = "U(+-d_conv^-1/2)"
    return {
        "conv1d.weight": ParameterRow(lambda s: (channels(s), 1, s.d_conv), False, False, words, _fill_by_fan_in),
        "conv1d.bias": ParameterRow(
            lambda s: (channels(s),), False, False, words, _fill_conv_bias, lambda s: s.conv_bias
        ),
    }


_MAMBA1 = {
    "in_proj.weight": _projection(lambda s: (2 * s.d_inner, s.d_model)),
    "in_proj.bias": _proj_bias(lambda s: (2 * s.d_inner,)),
    **_convolution(lambda s: s.d_inner),
    "x_proj.weight": _projection(lambda s: (s.dt_rank_size + 2 * s.state_size, s.d_inner)),
    "dt_proj.weight": _projection(lambda s: (s.d_inner, s.dt_rank_size)),
    "dt_proj.bias": _dt_bias(lambda s: (s.d_inner,)),
    "A_log": ParameterRow(
        lambda s: (s.d_inner, s.state_size), False, True, "log(1), ..., log(d_state)", _fill_spectrum
    ),
    "D": _ones(lambda s: (s.d_inner,)),
    "out_proj.weight": _out_proj(),
    "out_proj.bias": _proj_bias(lambda s: (s.d_model,)),
}


def conv_channels(section: ModelSection) -> int:
    """Channels of Mamba-2's convolution: x, and B and C of every group."""
    return section.d_inner + 2 * section.num_groups * section.state_size


_MAMBA2 = {
    "in_proj.weight": _projection(lambda s: (s.d_inner + conv_channels(s) + s.num_heads, s.d_model)),
    "in_proj.bias": _proj_bias(lambda s: (s.d_inner + conv_channels(s) + s.num_heads,)),
    **_convolution(conv_channels),
    "dt_bias": _dt_bias(lambda s: (s.num_heads,)),
    "A_log": ParameterRow(lambda s: (s.num_heads,), False, True, "log(U[1, 16])", _fill_head_rates),
    "D": _ones(lambda s: (s.num_heads,)),
    "norm.weight": _ones(lambda s: (s.d_inner,)),
    "out_proj.weight": _out_proj(),
    "out_proj.bias": _proj_bias(lambda s: (s.d_model,)),
}

_MIXERS = {"mamba1": _MAMBA1, "mamba2": _MAMBA2}
_EMBEDDING = ParameterRow(lambda s: (s.padded_vocab_size, s.d_model), True, False, "N(0, 0.02)", _fill_embedding)
_NORM = _ones(lambda s: (s.d_model,))
_HEAD = ParameterRow(
    _EMBEDDING.shape, True, False, "U(+-fan_in^-1/2)", _fill_by_fan_in, exists=lambda s: not s.tie_embeddings
)


def parameter_rows(section: ModelSection) -> dict[str, ParameterRow]:
    """Full parameter name -> its row, for every parameter of the model that `section` describes."""
    rows = {"embedding.weight": _EMBEDDING}
    for layer in range(section.num_layers):
        rows[f"layers.{layer}.norm.weight"] = _NORM
        rows |= {f"layers.{layer}.mixer.{name}": row for name, row in _MIXERS[section.block].items()}
    rows |= {"norm_f.weight": _NORM, "lm_head.weight": _HEAD}
    return {name: row for name, row in rows.items() if row.exists(section)}


def parameter_shapes(section: ModelSection) -> dict[str, tuple[int, ...]]:
    """Full parameter name -> shape, without building the model."""
    return {name: row.shape(section) for name, row in parameter_rows(section).items()}


def check_table_covers(model: nn.Module, section: ModelSection) -> None:
    """Every parameter of the model has exactly one row of its shape, and every row a parameter.

    Raises:
        RuntimeError: naming what differs; the table and the model were changed apart.
    """
    listed = parameter_shapes(section)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    differing = sorted(name for name in {**listed, **built} if listed.get(name) != built.get(name))
    if differing:
        lines = [f"{name}: {listed.get(name)} in the table, {built.get(name)} in the model" for name in differing]
        raise RuntimeError("the parameter table does not fit the model:\n" + "\n".join(lines))


def initial_value(name: str, section: ModelSection, seed: int) -> Tensor:
    """The first value of one parameter, fp32 on the CPU: a function of the seed and the name, of nothing else."""
    row = parameter_rows(section)[name]
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    tensor = torch.empty(row.shape(section), device="cpu", dtype=torch.float32)
    row.fill(tensor, section, generator)
    return tensor


@torch.no_grad()
def initialise(model: nn.Module, section: ModelSection, seed: int) -> None:
    """Gives every parameter its first value; the result depends on neither order, device nor dtype beyond rounding.

    Raises:
        RuntimeError: the table does not fit the model.
    """
    check_table_covers(model, section)
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, section, seed))


def stored_dtype(row: ParameterRow, dtype: torch.dtype) -> torch.dtype:
    """The dtype a parameter has in a model of `dtype`: where the table keeps fp32, never a narrower one."""
    return torch.float32 if row.keeps_fp32 and dtype not in (torch.float32, torch.float64) else dtype


def require_full_precision(**tensors: Tensor | None) -> None:
    """The assertion inside forward: what the recurrence depends on is fp32 or fp64 at the moment it is used.

    Raises:
        RuntimeError: naming the first tensor that is narrower.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(
                f"{name} is {tensor.dtype} but must stay float32: use autocast for mixed precision, and cast a "
                "parameter to its stored_dtype"
            )


@dataclass(frozen=True)
class ParameterSummary:
    """One printable line."""

    name: str
    shape: tuple[int, ...]
    decays: bool
    dtype: str
    initialisation: str


def parameter_table(model: nn.Module, section: ModelSection) -> list[ParameterSummary]:
    """The table of a built model, one line per parameter, for people."""
    check_table_covers(model, section)
    rows = parameter_rows(section)
    return [
        ParameterSummary(
            name,
            tuple(parameter.shape),
            rows[name].decays,
            str(parameter.dtype).removeprefix("torch."),
            rows[name].initialisation,
        )
        for name, parameter in model.named_parameters()
    ]
