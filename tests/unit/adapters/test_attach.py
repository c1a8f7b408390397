"""Adapters on models: they change nothing at first, their gradients are right, merging changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapted_models import CPU, adapted, base_model, everything, loss_of, section_of, some_rows

from mambatrain.adapters.attach import attach_adapter, describe_adapter, frozen_digest, merge_adapter, trained_shapes
from mambatrain.errors import UserError
from mambatrain.models.language_model import LanguageModel
from mambatrain.ops.backends import choose_backend
from mambatrain.ops.native import why_unavailable
from mambatrain.recipe import AdapterSection

STATE = AdapterSection(kind="state", window=True)
BACKENDS = [
    "torch",
    pytest.param(
        "native", marks=pytest.mark.skipif(why_unavailable(CPU, torch.float32) is not None, reason="no native kernels")
    ),
]
CASES = [(block, kind) for block in ("mamba1", "mamba2") for kind in ("lora", "dora", "state")]


def section_for(block: str, kind: str) -> Any:
    """DoRA has no embedding that is the head as well."""
    return section_of(block, tie_embeddings=kind != "dora")


def adapter_for(block: str, kind: str) -> AdapterSection:
    return STATE if kind == "state" else everything(block, kind, tied=kind != "dora")


@pytest.mark.parametrize(("block", "kind"), CASES)
def test_gradients_are_those_of_finite_differences(block: str, kind: str) -> None:
    model = base_model(section_for(block, kind), dtype=torch.float64)
    trained, start = adapted(model, adapter_for(block, kind))
    loss_of(model, start).backward()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(3)
    for name, parameter in trained.parameters.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        step = 1e-5
        sides = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * step)
                sides.append(float(loss_of(model, start)))
                parameter.add_(direction, alpha=-sign * step)
        expected = (sides[0] - sides[1]) / (2 * step)
        found = float((parameter.grad * direction).sum())
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("block", "kind"), CASES)
def test_every_backend_gives_each_trained_tensor_its_gradient(block: str, kind: str, backend: str) -> None:
    gradients = []
    for name, dtype in ((backend, torch.float32), ("torch", torch.float64)):
        model = base_model(section_for(block, kind), name, dtype)
        trained, start = adapted(model, adapter_for(block, kind))
        loss_of(model, start).backward()  # type: ignore[no-untyped-call]
        gradients.append({key: parameter.grad for key, parameter in trained.parameters.items()})
        assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    ours, exact = gradients
    for key, gradient in ours.items():
        assert gradient is not None and gradient.any(), key
        torch.testing.assert_close(gradient.double(), exact[key], rtol=0, atol=1e-4 * float(exact[key].abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("block", "kind"), [case for case in CASES if case[1] != "state"])
@pytest.mark.parametrize("narrow", [False, True])
def test_merged_equals_unmerged(block: str, kind: str, backend: str, narrow: bool) -> None:
    """Under autocast, too: what is added to a weight is not narrowed before it is."""
    section, adapter = section_for(block, kind), adapter_for(block, kind)
    base = {name: parameter.detach().clone() for name, parameter in base_model(section).named_parameters()}
    model = base_model(section, backend)
    trained, _ = adapted(model, adapter)
    values = {name: parameter.detach() for name, parameter in trained.parameters.items()}
    whole = LanguageModel(section, choose_backend(backend, CPU))
    whole.load_state_dict(merge_adapter(base, adapter, section, values))
    tokens, boundaries, _ = some_rows()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        unmerged, merged = model(tokens, boundaries)[0], whole(tokens, boundaries)[0]
        plain = base_model(section, backend)(tokens, boundaries)[0]
    assert (merged - unmerged).abs().max() <= 1e-6 * merged.abs().max()
    assert (plain - unmerged).abs().max() > 1e-2 * merged.abs().max()


@pytest.mark.parametrize(("block", "kind"), CASES)
def test_a_new_adapter_changes_nothing(block: str, kind: str) -> None:
    model = base_model(section_for(block, kind))
    before, digest = loss_of(model), frozen_digest(model)
    assert digest == frozen_digest(base_model(section_for(block, kind))), "nothing is frozen yet"
    trained, start = attach_adapter(model, adapter_for(block, kind))
    assert loss_of(model, start).item() == pytest.approx(before.item(), rel=1e-6)
    again, _ = attach_adapter(base_model(section_for(block, kind)), adapter_for(block, kind))
    for name, parameter in trained.parameters.items():
        assert torch.equal(parameter, again.parameters[name])
    if kind != "state":
        shapes = {name: tuple(parameter.shape) for name, parameter in trained.parameters.items()}
        assert shapes == trained_shapes(adapter_for(block, kind), section_for(block, kind))


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_activation_checkpointing_computes_with_the_adapter_again(block: str) -> None:
    gradients = []
    for kept in (False, True):
        model = base_model(section_of(block))
        trained, _ = adapted(model, everything(block, "lora"))
        model.recompute_every = int(kept)
        loss_of(model).backward()  # type: ignore[no-untyped-call]
        gradients.append([parameter.grad for parameter in trained.parameters.values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_frozen_digest_sees_a_frozen_weight_and_no_trained_one() -> None:
    model = base_model(section_of("mamba1"))
    trained, _ = attach_adapter(model, everything("mamba1", "lora"))
    before = frozen_digest(model)
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter.add_(1.0)
        assert frozen_digest(model) == before
        model.layers[1].norm.weight[0] += 1e-6
    assert frozen_digest(model) != before


def test_what_gets_no_gradient_is_named_once_it_could_have_one() -> None:
    model = base_model(section_of("mamba1"))
    trained, _ = attach_adapter(model, AdapterSection(targets=["in_proj", "dt_proj"]))
    A, B = "layers.0.mixer.dt_proj.lora_A", "layers.0.mixer.dt_proj.lora_B"
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    trained.refuse_no_gradient()
    assert {name.rsplit(".", 1)[1] for name in trained.unproven} == {"lora_A"}
    with torch.no_grad():
        trained.parameters[B].add_(0.1)
    model.zero_grad()
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    trained.refuse_no_gradient()
    assert A not in trained.unproven and "layers.1.mixer.dt_proj.lora_A" in trained.unproven
    trained.unproven.add(B)
    trained.parameters[B].grad = None
    with pytest.raises(UserError, match=f"no gradient reaches {B}$"):
        trained.refuse_no_gradient()


def test_coverage_is_said_for_each_kind_of_layer() -> None:
    model = base_model(section_of("mamba1"))
    adapter = AdapterSection(rank=2, alpha=8.0, targets=["x_proj", "embedding"], tune=["dt_bias", "conv1d"])
    trained, _ = attach_adapter(model, adapter)
    assert list(describe_adapter(adapter, model.section, trained)) == [
        "lora, rank 2, scale 4: 704 numbers",
        "  embedding  the model, 112 numbers",
        "  x_proj     2 of 2 layers, 208 numbers",
        "  dt_bias    2 of 2 layers, 64 numbers",
        "  conv1d     2 of 2 layers, 320 numbers",
    ]
