"""A cluster on one machine: one rank of many, on fake tensors, in fake process groups.

The real model is divided by the real `shard_model` and goes through one step; no bytes are held and nothing is sent,
but what the rank holds and every collective is counted. What `planning/sharding.py` says by formula is checked against
it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambatrain.adapters.trained import whole_model
from mambatrain.planning.sharding import Traffic
from mambatrain.training.objective import NextTokenLoss
from mambatrain.training.optimizer import build_optimizers
from mambatrain.training.sharding import make_mesh, shard_model, sum_gradients_in_next_backward
from mambatrain.training.step_trace import StorageLog, autocast_of, build_fake_model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from mambatrain.planning.plan import Place
    from mambatrain.recipe import Recipe

# How torch names them, and which of their tensors is the whole that all ranks have together.
_KINDS = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}


@dataclass(frozen=True)
class DryRun:
    """What one rank held and took part in."""

    num_devices: int
    shards: int
    weights: int
    """Bytes of this rank's shards."""
    gradients: int
    """The same behind the backward pass."""
    optimizer: int
    """Of its state behind the first update."""
    traffic: list[Traffic]
    """Of one step."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class CollectiveLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives and the bytes of the tensors that ranks have together."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = next((kind for name, kind in _KINDS.items() if name in func._opname), func._opname)
            tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
            self.counts[kind] += 1
            self.num_bytes[kind] += max((tensor.nbytes for tensor in tensors), default=0)
        return func(*args, **(kwargs or {}))


def run_dry(recipe: Recipe, place: Place, micro_batch_rows: int, num_micro_batches: int) -> DryRun:
    """One step of rank 0 of `place.num_devices`, whose model is divided.

    Args:
        recipe, place: what would run, and where; shards must be above 1.
        micro_batch_rows, num_micro_batches: of a rank.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=place.num_devices)
    try:
        mesh = make_mesh(place.shards, "cpu")
        with FakeTensorMode():
            return _step(recipe, place, mesh, micro_batch_rows, num_micro_batches)
    finally:
        dist.destroy_process_group()


def _step(recipe: Recipe, place: Place, mesh: DeviceMesh, micro_batch_rows: int, num_micro_batches: int) -> DryRun:
    log, collectives = StorageLog(), CollectiveLog()
    model = build_fake_model(recipe, place.backend, place.precision, log)
    shard_model(model, mesh, place.precision)
    objective, trained = NextTokenLoss(model), whole_model(model)
    weights = sum(_local_bytes(parameter) for parameter in trained.parameters.values())
    with log, collectives:
        tokens = torch.zeros(micro_batch_rows, recipe.data.row_tokens, dtype=torch.int64)
        boundaries = torch.zeros(tokens.shape, dtype=torch.bool)
        for index in range(num_micro_batches):
            sum_gradients_in_next_backward(objective, model, wanted=index == num_micro_batches - 1)
            with autocast_of(place.precision):
                loss = objective(tokens, boundaries, tokens)
            loss.backward()
        gradients = sum(_local_bytes(parameter.grad) for parameter in trained.parameters.values())
        del loss
        optimizers = build_optimizers(trained, recipe.optimizer)
        for optimizer in optimizers:
            optimizer.step()
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    traffic = [Traffic(kind, count, collectives.num_bytes[kind]) for kind, count in collectives.counts.items()]
    optimizer_bytes = sum(_local_bytes(state) for state in states if state.dim())
    return DryRun(place.num_devices, place.shards, weights, gradients, optimizer_bytes, sorted_traffic(traffic))


def sorted_traffic(traffic: list[Traffic]) -> list[Traffic]:
    """In the order of the formula's."""
    kinds = list(_KINDS.values())
    return sorted(traffic, key=lambda one: kinds.index(one.kind) if one.kind in kinds else len(kinds))


def _local_bytes(tensor: Tensor | None) -> int:
    """Of this rank's part."""
    from torch.distributed.tensor import DTensor

    if tensor is None:
        return 0
    return tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes
