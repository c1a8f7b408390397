"""The states that rows go on from, where `data.carry_state` lets each row slot follow its documents.

A rank holds those of its own slots, one state per layer. They move on with each applied draw and are detached: a draw's
gradients end where its rows begin.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mambatrain.data.document_streams import DocumentStreams
from mambatrain.models.state import BlockState
from mambatrain.runs.checkpoint_tensors import CARRIED, read_carried

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from mambatrain.models.language_model import LanguageModel
    from mambatrain.training.training_run import TrainingRun


def empty_states(model: LanguageModel, num_slots: int) -> list[BlockState]:
    """What the first draw of a run begins with: of so many slots of this rank."""
    weight = model.norm_f.weight  # fp32 under every precision, fp64 in an fp64 model
    return model.init_state(num_slots, weight.device, weight.dtype)


def states_of(states: list[BlockState], first: int, num_rows: int) -> list[BlockState]:
    """Those of some neighbouring slots of this rank."""
    return [BlockState(*(tensor[first : first + num_rows] for tensor in layer)) for layer in states]


def joined(parts: list[list[BlockState]]) -> list[BlockState]:
    """Those of all slots of this rank, of the states behind its micro-batches."""
    layers = zip(*parts, strict=True)
    return [BlockState(*(torch.cat(tensors) for tensors in zip(*layer, strict=True))) for layer in layers]


def are_finite(states: list[BlockState]) -> bool:
    """Whether every number is; waits for the device."""
    return all(bool(torch.isfinite(tensor).all()) for layer in states for tensor in layer)


def forget_begun(run: TrainingRun, first_draw: int, draw: int) -> None:
    """Behind draws that were not applied, `first_draw` up to `draw` (exclusive): a gap in what the slots were shown.

    A slot keeps the state of before where it is still in the same document, and begins empty where another began in the
    gap: no document is ever read in the state of another.
    """
    if run.carried is None:
        return
    streams = run.order.stages[0].sources[0].windows
    assert isinstance(streams, DocumentStreams)  # data.carry_state
    num_slots = len(run.carried[0].ssm)
    first = run.accelerator.process_index * num_slots
    begun = [streams.began_since(first + slot, first_draw, draw) for slot in range(num_slots)]
    kept = [index for index, others in enumerate(begun) if not others]
    run.carried = [BlockState(*(_only(tensor, kept) for tensor in layer)) for layer in run.carried]


def tensors_by_slot(states: list[BlockState] | None) -> dict[str, Tensor]:
    """Names in a checkpoint -> states (rows_per_step, ...); where there are several ranks, this one's shard of them."""
    if states is None:
        return {}
    return {
        f"{CARRIED}layers.{number}.{field}": tensor if _is_alone() else _sharded(tensor)
        for number, layer in enumerate(states)
        for field, tensor in layer._asdict().items()
    }


def whole_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors_by_slot` with the slots of all ranks; every rank takes part."""
    return tensors if _is_alone() else {name: cast("DTensor", one).full_tensor() for name, one in tensors.items()}


def restore_states(checkpoint: Path, empty: list[BlockState]) -> list[BlockState]:
    """The states of this rank's slots, whatever the number of ranks that wrote them.

    Raises:
        UserError: the checkpoint has none of these names and shapes.
    """
    read = read_carried(checkpoint, tensors_by_slot(empty)).values()
    own = iter([tensor if _is_alone() else cast("DTensor", tensor).to_local() for tensor in read])
    return [BlockState(window, ssm) for window, ssm in zip(own, own, strict=True)]


def _only(tensor: Tensor, rows: list[int]) -> Tensor:
    """The tensor with 0 in its other rows."""
    kept = torch.zeros_like(tensor)
    kept[rows] = tensor[rows]
    return kept


def _sharded(own: Tensor) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh(own.device.type, (torch.distributed.get_world_size(),))
    return DTensor.from_local(own, mesh, [Shard(0)])


def _is_alone() -> bool:
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())
