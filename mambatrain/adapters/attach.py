"""An adapter on a model, and what it comes to: what is trained, how much of each kind of layer, the merged weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mambatrain.adapters.initial_state import InitialState, state_names
from mambatrain.adapters.low_rank import Factors, LowRank, effective_weight, first_factors
from mambatrain.adapters.trained import TrainedTensors
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import parameter_shapes
from mambatrain.recipe import AdapterSection, ModelSection

_OF_A_MODEL = ("embedding", "lm_head")


def adapted_weights(adapter: AdapterSection, model: ModelSection) -> list[str]:
    """Names of the matrices that get factors, without `.weight`."""
    names = []
    for target in adapter.targets_in(model):
        if target in _OF_A_MODEL:
            names.append(target)
        else:
            names += [f"layers.{layer}.mixer.{target}" for layer in range(model.num_layers)]
    return names


def tuned_parameters(adapter: AdapterSection, model: ModelSection) -> list[str]:
    """Names of the parameters that are trained themselves."""
    of_mixer = {
        "conv1d": ["conv1d.weight", "conv1d.bias"],
        "dt_bias": ["dt_proj.bias" if model.block == "mamba1" else "dt_bias"],
    }
    shapes = parameter_shapes(model)
    names = [
        f"layers.{layer}.mixer.{name}"
        for kind in adapter.tune
        for name in of_mixer.get(kind, [kind])
        for layer in range(model.num_layers)
    ]
    return [name for name in names if name in shapes]  # a convolution may have no bias


def attach_adapter(model: LanguageModel, adapter: AdapterSection) -> tuple[TrainedTensors, InitialState | None]:
    """Freezes a model and puts an adapter on it that changes nothing yet.

    Returns:
        What is trained; and where the adapter is an initial state, that state: whoever runs the model starts from it.
    """
    model.requires_grad_(False)
    if adapter.kind == "state":
        start = InitialState(model, adapter.window)
        named = dict(zip(state_names(start), start.parameters(), strict=True))
        return TrainedTensors(named, frozenset(), unproven=set(named)), start
    parameters: dict[str, nn.Parameter] = {}
    partners: dict[str, str] = {}
    decaying: set[str] = set()
    matrices: set[str] = set()
    for name in adapted_weights(adapter, model.section):
        module = model.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, Tensor)
        transposed, with_norms = name == "embedding", adapter.kind == "dora"
        factors = first_factors(name, weight.detach(), adapter.rank, transposed, with_norms, adapter.seed)
        low_rank = LowRank(factors, adapter.scale, transposed)
        parametrize.register_parametrization(module, "weight", low_rank, unsafe=True)  # shape and dtype stay
        A, B = f"{name}.lora_A", f"{name}.lora_B"
        parameters |= {A: low_rank.lora_A, B: low_rank.lora_B}
        if low_rank.magnitude is not None:
            parameters[f"{name}.magnitude"] = low_rank.magnitude
        partners |= {A: B, B: A}
        decaying |= {A, B}
        matrices |= set() if name in _OF_A_MODEL else {A, B}
    for name in tuned_parameters(adapter, model.section):
        parameters[name] = model.get_parameter(name)
        parameters[name].requires_grad_(True)
    return TrainedTensors(parameters, frozenset(decaying), frozenset(matrices), partners, set(parameters)), None


def merge_adapter(
    tensors: dict[str, Tensor], adapter: AdapterSection, model: ModelSection, trained: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights that base and adapter come to, at least fp32; `trained` has the names of a checkpoint."""
    merged = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in tensors.items()}
    for name in adapted_weights(adapter, model):
        weight = merged[f"{name}.weight"]
        factors = Factors(
            trained[f"{name}.lora_A"].to(weight),
            trained[f"{name}.lora_B"].to(weight),
            trained[f"{name}.magnitude"].to(weight) if adapter.kind == "dora" else None,
        )
        merged[f"{name}.weight"] = effective_weight(weight, factors, adapter.scale, name == "embedding").contiguous()
    for name in tuned_parameters(adapter, model):
        merged[name] = trained[name].to(merged[name])
    return merged


def trained_shapes(adapter: AdapterSection, model: ModelSection) -> dict[str, tuple[int, ...]]:
    """Name in a checkpoint -> shape, for LoRA and DoRA, without building the model."""
    shapes = parameter_shapes(model)
    found: dict[str, tuple[int, ...]] = {}
    for name in adapted_weights(adapter, model):
        size_out, size_in = shapes[f"{name}.weight"][:: -1 if name == "embedding" else 1]
        found |= {f"{name}.lora_A": (adapter.rank, size_in), f"{name}.lora_B": (size_out, adapter.rank)}
        if adapter.kind == "dora":
            found[f"{name}.magnitude"] = (size_out,)
    return found | {name: shapes[name] for name in tuned_parameters(adapter, model)}


def frozen_digest(model: LanguageModel) -> str:
    """SHA-256 of all that is not trained: what must be the same at the end as at the beginning."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_adapter(adapter: AdapterSection, model: ModelSection, trained: TrainedTensors) -> Iterator[str]:
    """Lines for people: what is trained, for each kind of layer, and what is not."""
    total = sum(parameter.numel() for parameter in trained.parameters.values())
    if adapter.kind == "state":
        yield f"the initial state of {model.num_layers} layers, {total:,} numbers; rows of one document each"
    else:
        yield f"{adapter.kind}, rank {adapter.rank}, scale {adapter.scale:g}: {total:,} numbers"
    kinds: dict[str, tuple[set[str], int]] = {}
    for name, parameter in trained.parameters.items():
        kind = _kind_of(name)
        places, count = kinds.get(kind, (set(), 0))
        kinds[kind] = (places | {name.removesuffix(kind).split(kind)[0]}, count + parameter.numel())
    for kind, (places, count) in kinds.items():
        of = "the model" if kind in _OF_A_MODEL else f"{len(places)} of {model.num_layers} layers"
        yield f"  {kind:<10} {of}, {count:,} numbers"


def _kind_of(name: str) -> str:
    """`layers.0.mixer.in_proj.lora_A` -> `in_proj`, `layers.0.mixer.dt_proj.bias` -> `dt_bias`."""
    if name.endswith(".dt_proj.bias"):
        return "dt_bias"
    parts = [part for part in name.split(".") if part not in {"lora_A", "lora_B", "magnitude", "weight", "bias"}]
    return parts[-1]
