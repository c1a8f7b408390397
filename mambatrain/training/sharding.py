"""Weights, gradients and optimizer state divided over ranks: PyTorch's FSDP2, block by block.

A matrix is sharded by rows over the ranks of a group and gathered for the moment a block needs it. With groups smaller
than the run, each group holds the whole model and gradients are summed over groups, too (HSDP).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mambatrain.errors import UserError
from mambatrain.models.parameters import parameter_rows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

    from mambatrain.devices import Precision
    from mambatrain.models.language_model import LanguageModel
    from mambatrain.recipe import Recipe


def num_shards(asked: str, num_processes: int, processes_per_node: int | None = None) -> int:
    """How many ranks share one copy of the model; 1 is DDP.

    Args:
        asked: `no`, `full` (all ranks), `node` (those of a machine), or a number.
        num_processes: of the run.
        processes_per_node: None: of this machine, as torchrun says.

    Raises:
        UserError: it is none of these, or does not divide the processes.
    """
    per_node = processes_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    numbers = {"no": 1, "full": num_processes, "node": per_node}
    if asked not in numbers and not asked.isdecimal():
        raise UserError(f"--shard {asked} is none of no, full, node or a number", "--shard full divides it over all")
    shards = numbers[asked] if asked in numbers else int(asked)
    if shards < 1 or num_processes % shards:
        raise UserError(
            f"--shard {asked}: {num_processes} processes do not divide into groups of {shards}",
            "give a divisor of the number of processes",
        )
    return shards


def refuse_with_shards(recipe: Recipe, asked: str) -> None:
    """
    Raises:
        UserError: the recipe asks for something that a divided model does not do.
    """
    if named := refused_with_shards(recipe):
        raise UserError(f"--shard {asked} does not go with {', '.join(named)}", "leave one of them out")


def refused_with_shards(recipe: Recipe) -> list[str]:
    """Settings of the recipe that a divided model does not do."""
    refused = {
        "guards.health_every_steps": recipe.guards.health_every_steps is not None,
        "adapter": recipe.adapter is not None,
        "training.segment_tokens": recipe.training.segment_tokens is not None,
        "parameters.frozen": bool(recipe.parameters.frozen),
        "preferences": recipe.preferences is not None,
        # blocks of 256 numbers do not follow the rows that a model is divided by
        "optimizer.state_precision 8bit": recipe.optimizer.state_precision == "8bit",
    }
    return [setting for setting, is_set in refused.items() if is_set]


def make_mesh(shards: int, device_type: str) -> DeviceMesh:
    """Groups of `shards` neighbouring ranks, each of which is to hold the model once."""
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh

    groups = get_world_size() // shards
    if groups == 1:
        return init_device_mesh(device_type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (groups, shards), mesh_dim_names=("replicate", "shard"))


def shard_model(model: LanguageModel, mesh: DeviceMesh, precision: Precision) -> None:
    """Divides a model without values over the ranks of a mesh; they are filled in afterwards.

    Under bf16 the matrices of a block are gathered in bf16 and their gradients summed in fp32. What the parameter table
    keeps in fp32, and the small matrices beside it, form a unit of their own that nothing casts. The embedding lies in
    the root's unit: a tied head finds it gathered.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    rows = parameter_rows(model.section)
    for index, layer in enumerate(model.layers):
        if precision == "bf16":
            matrices: list[nn.Module] = [
                module
                for name, module in layer.named_modules()
                if isinstance(module, nn.Linear)
                and not any(rows[f"layers.{index}.{name}.{of}"].keeps_fp32 for of, _ in module.named_parameters())
            ]
            fully_shard(matrices, mesh=mesh, mp_policy=narrow)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss_and_state")


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` was applied."""
    if not _in_a_group():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Behind a forward pass without a backward one: the root's unit stays gathered for that, as other parameters."""
    if is_sharded(model):
        cast("FSDPModule", model).reshard()


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copies a whole value, the same on every rank, into a parameter or into this rank's shard of one."""
    if _in_a_group():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(parameter, DTensor):
            value = value.to(parameter.device, parameter.dtype)
            # No source rank: every rank cuts its shard from its own copy, nothing is sent.
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float) -> float:
    """Scales gradients to at most this norm, and returns the norm they had over all shards.

    One that is not finite scales nothing: NaN would spread over the gradients that are not to blame.
    """
    held = [parameter for parameter in parameters if parameter.grad is not None]
    total = torch.nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in held])
    if math.isfinite(value := float_of(total)):
        torch.nn.utils.clip_grads_with_norm_(held, norm, total)
    return value


def float_of(scalar: Tensor) -> float:
    """A number over all shards; where it is sharded, every rank asks together."""
    if _in_a_group():
        from torch.distributed.tensor import DTensor

        if isinstance(scalar, DTensor):
            scalar = scalar.full_tensor()
    return float(scalar)


def sum_gradients_in_next_backward(prepared: nn.Module, model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass sums gradients over ranks, or adds to this rank's own until one does.

    Args:
        prepared: what is called: DDP's wrapper where there is one.
        model: the language model in it, sharded or not.
        wanted: True in the last micro-batch of a draw alone.
    """
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(prepared, DistributedDataParallel):
        prepared.require_backward_grad_sync = wanted  # what its context manager no_sync does
    elif is_sharded(model):
        cast("FSDPModule", model).set_requires_gradient_sync(wanted)


def _in_a_group() -> bool:
    """Whether there are other ranks; spares a lone process the import of FSDP, most of a second."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
