"""The health line tells what the scans were given, warns of layers without a memory, and changes no bit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection, read_recipe
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.runs.folder import read_log
from mambatrain.training.assemble import Where
from mambatrain.training.health import measure_health
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

SCANS = {"mamba1": "selective_scan", "mamba2": "ssd"}


def tiny_model(block: str, given: list[dict[str, Tensor]] | None = None) -> LanguageModel:
    """A model; what its scans are given and what state they leave is appended to `given`."""
    section = ModelSection(
        block=block, d_model=16, num_layers=2, vocab_size=32, head_dim=8 if block == "mamba2" else 64
    )
    backend = choose_backend("torch", torch.device("cpu"))
    scan = getattr(backend, SCANS[block])

    def record(x: Tensor, dt: Tensor, A: Tensor, *rest: Any, **named: Any) -> Any:
        y, h = scan(x, dt, A, *rest, **named)
        if given is not None:
            given.append({"dt": F.softplus(dt + rest[-1]), "A": A, "h": h})
        return y, h

    model = LanguageModel(section, replace(backend, **{SCANS[block]: record}))
    initialise(model, section, seed=0)
    return model


@pytest.mark.parametrize("block", SCANS)
def test_it_tells_what_the_scan_was_given(block: str) -> None:
    given: list[dict[str, Tensor]] = []
    model = tiny_model(block, given)
    tokens, boundaries = torch.arange(24)[None] % 32, torch.arange(24)[None] == 11
    model.summed_loss(tokens, boundaries, tokens).backward()
    given.clear()
    found = measure_health(model, tokens, boundaries, clipping=0.5)
    assert len(found) == len(given) == 2
    for layer, module, scan in zip(found, model.layers, given, strict=True):
        dt, A = scan["dt"].double(), scan["A"].double()
        decay = torch.exp(dt[..., None] * A.view(dt.shape[-1], -1))
        expected = [dt.min(), dt.max(), decay.min(), decay.max(), scan["h"].square().mean().sqrt()]
        told = [layer.dt_min, layer.dt_max, layer.decay_min, layer.decay_max, layer.state_norm]
        assert told == pytest.approx([float(value) for value in expected], rel=1e-5)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in module.parameters()))
        assert layer.gradient_norm == pytest.approx(norm / 0.5, rel=1e-5)
        assert layer.warning is None


@pytest.mark.parametrize("block", SCANS)
@pytest.mark.parametrize(("shift", "said"), [(40.0, "has collapsed"), (-40.0, "is saturated")])
def test_a_layer_without_a_memory_is_warned_of(block: str, shift: float, said: str) -> None:
    model = tiny_model(block)
    with torch.no_grad():
        dict(model.named_parameters())["layers.1.mixer." + ("dt_proj.bias" if block == "mamba1" else "dt_bias")].add_(
            shift
        )
    tokens = torch.arange(24)[None] % 32
    whole, spoilt = measure_health(model, tokens, torch.zeros_like(tokens, dtype=torch.bool))
    assert whole.warning is None
    assert said in (spoilt.warning or "")


def test_the_line_is_in_the_log_and_the_training_is_the_same_to_the_bit(
    write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    where = Where(device="cpu", kernels="torch", quiet=True)
    plain = read_recipe(str(write_tiny_recipe(checkpoint__keep_newest=9)))
    watched = read_recipe(str(write_tiny_recipe(checkpoint__keep_newest=9, guards={"health_every_steps": 3})))
    for name, recipe in (("plain", plain), ("watched", watched)):
        assert run_training(recipe, tmp_path / name, where, "if-possible", StopRequest()) == 0
    ends = [list_checkpoints(tmp_path / name)[-1] / "model.safetensors" for name in ("plain", "watched")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    log = read_log(tmp_path / "watched" / "log.jsonl")
    health = [line for line in log if line["event"] == "health"]
    assert [(line["step"], line["draw"]) for line in health] == [(0, 0), (3, 3), (6, 6), (9, 9)]
    steps = {line["draw"]: line for line in log if line["event"] == "step"}
    for line in health:
        of_layers = math.sqrt(sum(layer["gradient_norm"] ** 2 for layer in line["layers"]))
        assert 0.0 < of_layers < steps[line["draw"]]["gradient_norm"]
        assert line["warnings"] == []
    for checkpoint in list_checkpoints(tmp_path / "watched")[1:]:
        shutil.rmtree(checkpoint)
    assert run_training(watched, tmp_path / "watched", where, "if-possible", StopRequest()) == 0
    assert [line for line in read_log(tmp_path / "watched" / "log.jsonl") if line["event"] == "health"] == health
