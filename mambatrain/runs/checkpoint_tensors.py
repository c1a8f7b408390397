"""The tensors of a checkpoint, in safetensors: two whole files, or a file a rank where the model is sharded.

    model.safetensors, optimizer.safetensors       parameters by name; PARAMETER.exp_avg, PARAMETER.step, ...
    shard-00001-model-00001-of-00001.safetensors   both, one rank's parts with their offsets in the file's metadata
    extra.safetensors                              what else is needed to go on, where there is any; carried states:
                                                   (rows_per_step, ...), each rank's in its own file if sharded

Either is read into a model on any number of ranks, sharded or not: torch.distributed.checkpoint reads the slices that
a rank needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mambatrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EXTRA_FILE = "extra.safetensors"
CARRIED = "carried."
"""Of the names of states that rows go on from; the first dimension is the row slot."""
_SHARDS = "shard-*.safetensors"
EXTRA = "extra."


def missing_kind(names: set[str]) -> str | None:
    """The file that a checkpoint with these files lacks, or None; a missing shard is the manifest's to notice."""
    if any(Path(name).match(_SHARDS) for name in names):
        return None
    return next((name for name in (MODEL_FILE, OPTIMIZER_FILE) if name not in names), None)


def model_files(checkpoint: Path) -> list[Path]:
    """The files that hold a checkpoint's model."""
    whole = checkpoint / MODEL_FILE
    return [whole] if whole.is_file() else sorted(checkpoint.glob(_SHARDS))


def write_whole(
    folder: Path, model: dict[str, Tensor], optimizer: dict[str, Tensor], extra: dict[str, Tensor]
) -> list[Path]:
    """The files of one process that has everything."""
    from safetensors.torch import save_file

    save_file(model, folder / MODEL_FILE, metadata={"format": "pt"})
    save_file(optimizer, folder / OPTIMIZER_FILE, metadata={"format": "pt"})
    return [folder / MODEL_FILE, folder / OPTIMIZER_FILE, *write_extra(folder, extra)]


def write_extra(folder: Path, extra: dict[str, Tensor]) -> list[Path]:
    """A file of what is neither parameter nor optimizer state, where there is any."""
    from safetensors.torch import save_file

    if not extra:
        return []
    # Beside other tensors a name must say whose it is: a reader of the folder sees them all.
    save_file({f"{EXTRA}{name}": value for name, value in extra.items()}, folder / EXTRA_FILE)
    return [folder / EXTRA_FILE]


def read_extra(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of `write_extra` by name, on the CPU; none where a checkpoint has none."""
    from safetensors.torch import load_file

    file = checkpoint / EXTRA_FILE
    tensors: dict[str, Tensor] = load_file(file) if file.is_file() else {}
    return {name.removeprefix(EXTRA): value for name, value in tensors.items()}


@dataclass(frozen=True)
class Part:
    """What one rank writes of a tensor."""

    tensor: Tensor
    offsets: tuple[int, ...]
    """Where it begins in the whole."""


def own_parts(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    """The parts that this rank writes, by name; what several ranks have, they take in turn.

    A function of names, shapes and ranks: nothing is agreed on, and a run that is resumed divides them as before.

    Args:
        tensors: the same names on all ranks; sharded (DTensor) or the same on all of them.
    """
    from torch.distributed import get_rank, get_world_size
    from torch.distributed.tensor import DTensor

    parts = {}
    # By name: a resumed optimizer has its tensors in another order than one that was never stopped.
    sharded = sorted(name for name, tensor in tensors.items() if isinstance(tensor, DTensor))
    same_everywhere = sorted(tensors.keys() - sharded)  # counts of steps
    for name in same_everywhere[get_rank() :: get_world_size()]:
        parts[name] = Part(tensors[name].detach(), (0,) * tensors[name].ndim)
    for index, name in enumerate(sharded):
        tensor = tensors[name]
        assert isinstance(tensor, DTensor)
        copy, num_copies = 0, 1
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None  # every rank is in the mesh
        for axis, placement in enumerate(tensor.placements):
            if placement.is_replicate():
                copy = copy * tensor.device_mesh.size(axis) + coordinate[axis]
                num_copies *= tensor.device_mesh.size(axis)
        (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        if index % num_copies == copy and chunk.sizes.numel():
            parts[name] = Part(tensor.to_local().detach(), tuple(chunk.offsets))
    return parts


def write_shard(folder: Path, rank: int, parts: Mapping[str, Part]) -> list[Path]:
    """One rank's file, as torch.distributed.checkpoint's `HuggingFaceStorageReader` reads it."""
    from safetensors.torch import save_file

    if not parts:
        return []
    file = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
    where = {name: {"saved_offsets": list(part.offsets)} for name, part in parts.items()}
    # This entry alone: safetensors writes several in any order, and the same tensors are to give the same bytes.
    metadata = {"DCP_SHARDING_INFO": json.dumps(where)}
    save_file({name: part.tensor for name, part in parts.items()}, file, metadata=metadata)
    return [file]


def read_into(checkpoint: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fills parameters (this rank's shards of them) in place and returns the optimizer's tensors, sharded alike.

    Raises:
        UserError: the checkpoint holds something else than these parameters.
    """
    import torch
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    stored = {key: entry for key, entry in stored.items() if not key.startswith(EXTRA)}
    differing = sorted(
        {key for key in stored if key not in parameters and key.rpartition(".")[0] not in parameters}
        | {name for name, value in parameters.items() if getattr(stored.get(name), "size", None) != value.shape}
    )
    if differing:
        raise UserError(
            f"{checkpoint} does not hold what the recipe trains: {', '.join(differing[:5])}",
            "the recipe and its checkpoints are of two runs; begin again with --fresh",
        )
    optimizer: dict[str, Tensor] = {}
    for key, entry in stored.items():
        assert isinstance(entry, TensorStorageMetadata)  # nothing else is written
        if key in parameters:
            continue
        parameter = parameters[key.rpartition(".")[0]]
        if entry.size == parameter.shape:
            optimizer[key] = torch.empty_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
        else:  # a count of steps
            optimizer[key] = torch.empty(entry.size, dtype=entry.properties.dtype, device=parameter.device)
    _load(checkpoint, {name: parameter.detach() for name, parameter in parameters.items()} | optimizer)
    return optimizer


def read_carried(checkpoint: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """States by name, sharded as those of `like` are, in the dtypes they are stored in.

    Raises:
        UserError: the checkpoint has none of such a name and shape.
    """
    import torch
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored, tensors = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata, {}
    for name, value in like.items():
        entry = stored.get(f"{EXTRA}{name}")
        if not isinstance(entry, TensorStorageMetadata) or entry.size != value.shape:
            raise UserError(
                f"{checkpoint} does not hold the states that rows go on from: {name}",
                "the recipe and its checkpoints are of two runs; begin again with --fresh",
            )
        tensors[name] = torch.empty_like(value, dtype=entry.properties.dtype)
    _load(checkpoint, {f"{EXTRA}{name}": tensor for name, tensor in tensors.items()})
    return tensors


def read_model_tensors(checkpoint: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Some parameters of a checkpoint, whole and on the CPU; those that it does not have are left out."""
    import torch
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored, tensors = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata, {}
    for name in names:
        entry = stored.get(name)
        if isinstance(entry, TensorStorageMetadata):
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    _load(checkpoint, tensors)
    return tensors


def _load(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors in place. Each rank reads its own slices: there is nothing to agree on."""
    import warnings

    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be
        load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
