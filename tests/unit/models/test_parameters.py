"""The parameter table: it covers the model, its initialisation is mamba-ssm's, and forward holds to its precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import (
    check_table_covers,
    initial_value,
    initialise,
    parameter_rows,
    parameter_shapes,
    parameter_table,
    stored_dtype,
)
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection

BACKEND = choose_backend("torch", torch.device("cpu"))
SMALL = {"d_model": 32, "num_layers": 2, "vocab_size": 50}
SECTIONS = {
    "mamba1": ModelSection(block="mamba1", **SMALL),
    "mamba1 untied, biases": ModelSection(block="mamba1", tie_embeddings=False, proj_bias=True, **SMALL),
    "mamba1 no conv bias": ModelSection(block="mamba1", conv_bias=False, dt_rank=7, d_conv=3, **SMALL),
    "mamba2": ModelSection(block="mamba2", head_dim=16, **SMALL),
    "mamba2 variant": ModelSection(
        block="mamba2", head_dim=8, num_groups=4, tie_embeddings=False, proj_bias=True, conv_bias=False, **SMALL
    ),
}
WIDE = {
    "mamba1": ModelSection(block="mamba1", d_model=256, num_layers=9, vocab_size=1000, tie_embeddings=False),
    "mamba2": ModelSection(block="mamba2", d_model=1024, num_layers=9, vocab_size=100, head_dim=2, proj_bias=True),
}


def build(section: ModelSection, seed: int = 0) -> LanguageModel:
    model = LanguageModel(section, BACKEND)
    initialise(model, section, seed)
    return model


@pytest.mark.parametrize("case", SECTIONS)
def test_the_table_has_every_parameter_once_in_its_shape(case: str) -> None:
    section = SECTIONS[case]
    with torch.device("meta"):
        model = LanguageModel(section, BACKEND)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert parameter_shapes(section) == built
    lines = parameter_table(model, section)
    assert sorted(line.name for line in lines) == sorted(built)
    assert all(line.initialisation and line.dtype == "float32" for line in lines)


def test_a_parameter_without_a_row_is_refused() -> None:
    section = SECTIONS["mamba1"]
    model = LanguageModel(section, BACKEND)
    model.layers[0].mixer.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"layers\.0\.mixer\.extra: None in the table, \(3,\) in the model"):
        check_table_covers(model, section)
    del model.layers[0].mixer.extra, model.layers[1].mixer.D
    with pytest.raises(RuntimeError, match=r"layers\.1\.mixer\.D"):
        initialise(model, section, 0)


@pytest.mark.parametrize("case", SECTIONS)
def test_only_projections_embedding_and_head_decay(case: str) -> None:
    projections = ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
    for name, row in parameter_rows(SECTIONS[case]).items():
        assert row.decays == (name.endswith(projections) or name in {"embedding.weight", "lm_head.weight"}), name


@pytest.mark.parametrize("case", SECTIONS)
def test_forward_refuses_exactly_what_the_table_keeps_in_fp32(case: str) -> None:
    section = SECTIONS[case]
    tokens = torch.arange(6)[None]
    for name, row in parameter_rows(section).items():
        if ".1." in name:
            continue  # the second layer is the first one again
        model = build(section)
        for other, parameter in model.named_parameters():  # as an honest bf16 model has them
            parameter.data = parameter.data.to(stored_dtype(parameter_rows(section)[other], torch.bfloat16))
        parameter = model.get_parameter(name)
        assert parameter.dtype == (torch.float32 if row.keeps_fp32 else torch.bfloat16)
        assert model(tokens)[0].dtype == torch.float32
        if row.keeps_fp32:
            parameter.data = parameter.data.bfloat16()
            short = {"dt_proj.bias": "dt_bias"}.get(name.removeprefix("layers.0.mixer."), name.split(".")[-1])
            named = "norm.weight" if "norm" in name else short
            with pytest.raises(RuntimeError, match=rf"{named} is torch.bfloat16 but must stay float32"):
                model(tokens)


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_a_narrow_state_is_refused(block: str) -> None:
    model = build(SECTIONS[block])
    state = model.init_state(1, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"state is torch\.bfloat16"):
        model(torch.arange(6)[None], None, state)


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_under_autocast_products_are_bf16_and_state_and_parameters_fp32(block: str) -> None:
    model = build(SECTIONS[block])
    tokens = torch.arange(40)[None]
    full, state = model(tokens)
    seen: dict[str, torch.dtype] = {}
    for layer in model.layers:
        layer.register_forward_hook(lambda m, i, o: seen.update(residual=o[0].dtype))
        layer.mixer.in_proj.register_forward_hook(lambda m, i, o: seen.update(projection=o.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, mixed_state = model(tokens)
    assert seen == {"residual": torch.float32, "projection": torch.bfloat16}
    for one, other in zip(mixed_state, state, strict=True):
        assert one.ssm.dtype == torch.float32
        assert 0 < (one.ssm - other.ssm).abs().max() < 0.05 * other.ssm.abs().max()
    assert (mixed - full).abs().max() < 0.05 * full.abs().max()
    mixed.square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_the_first_values_depend_on_seed_and_name_alone(block: str) -> None:
    section = SECTIONS[block]
    model = build(section, seed=3)
    for name in reversed(list(parameter_rows(section))):  # another order
        assert torch.equal(initial_value(name, section, 3), model.get_parameter(name)), name
    double = LanguageModel(section, BACKEND).double()
    initialise(double, section, 3)
    assert all(torch.equal(p, double.get_parameter(name).float()) for name, p in model.named_parameters())
    deeper = section.model_copy(update={"num_layers": 5})
    same = "layers.1.mixer.in_proj.weight"
    assert torch.equal(initial_value(same, section, 3), initial_value(same, deeper, 3))
    random = [name for name in parameter_rows(section) if name.endswith("in_proj.weight")]
    values = [initial_value(name, section, seed) for name in random for seed in (3, 4)]
    assert len({float(value.sum()) for value in values}) == len(values)


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """Within bounds that it nearly reaches, and nowhere off the straight line of a uniform distribution (KS, 1e-4)."""
    values = values.flatten().double().sort().values
    assert low <= values[0], "below the bound"
    assert values[-1] <= high, "above the bound"
    steps = torch.linspace(0, 1, len(values), dtype=torch.float64)
    assert ((values - low) / (high - low) - steps).abs().max() < 2.23 / math.sqrt(len(values))


def value_of(block: str, name: str, section: ModelSection | None = None) -> Tensor:
    return initial_value(f"layers.4.mixer.{name}", section or WIDE[block], 0)


@pytest.mark.parametrize(
    ("block", "name", "bound"),
    [
        ("mamba1", "in_proj.weight", 256**-0.5),
        ("mamba1", "x_proj.weight", 512**-0.5),
        ("mamba1", "dt_proj.weight", 16**-0.5),  # dt_rank
        ("mamba1", "out_proj.weight", (512 * 9) ** -0.5),  # nine layers write into the residual stream
        ("mamba1", "conv1d.weight", 0.5),
        ("mamba1", "conv1d.bias", 0.5),
        ("mamba2", "in_proj.weight", 1024**-0.5),
        ("mamba2", "out_proj.weight", (2048 * 9) ** -0.5),
        ("mamba2", "conv1d.weight", 0.5),
        ("mamba2", "conv1d.bias", 0.5),
    ],
)
def test_uniform_values_have_their_bound(block: str, name: str, bound: float) -> None:
    assert_uniform(value_of(block, name), -bound, bound)


@pytest.mark.parametrize(("block", "name"), [("mamba1", "dt_proj.bias"), ("mamba2", "dt_bias")])
def test_delta_is_log_uniform(block: str, name: str) -> None:
    delta = F.softplus(value_of(block, name).double())
    assert_uniform(delta.log(), math.log(0.001) - 1e-3, math.log(0.1) + 1e-3)
    floor = WIDE[block].model_copy(update={"dt_init_floor": 0.01})
    floored = F.softplus(value_of(block, name, floor).double())
    assert floored.min() == pytest.approx(0.01, rel=1e-4)
    assert (floored < 0.0101).double().mean() == pytest.approx(0.5, abs=0.08)  # the lower of two decades


def test_the_decay_rates_are_mamba_ssms() -> None:
    assert torch.allclose(value_of("mamba1", "A_log").exp(), torch.arange(1.0, 17.0).expand(512, 16))
    assert_uniform(value_of("mamba2", "A_log").double().exp(), 1 - 1e-5, 16 + 1e-5)


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_the_other_values(block: str) -> None:
    section = WIDE[block]
    embedding = initial_value("embedding.weight", section, 0)
    assert float(embedding.std()) == pytest.approx(0.02, rel=0.01)
    assert abs(float(embedding.mean())) < 1e-3
    assert float((embedding.abs() < 0.02).float().mean()) == pytest.approx(0.6827, abs=0.01)
    for name in parameter_rows(section):
        if name.endswith((".D", "norm.weight", "norm_f.weight")):
            assert (initial_value(name, section, 0) == 1).all()
        if name.endswith(("in_proj.bias", "out_proj.bias")):
            assert (initial_value(name, section, 0) == 0).all()
    if not section.tie_embeddings:
        assert_uniform(initial_value("lm_head.weight", section, 0), -(256**-0.5), 256**-0.5)
