"""The tensors of a checkpoint, in safetensors: two whole files, or a file a rank where the model is sharded.

    model.safetensors, optimizer.safetensors       parameters by name; PARAMETER.exp_avg, PARAMETER.step, ...
    shard-00001-model-00001-of-00001.safetensors   both, one rank's parts with their offsets in the file's metadata

Either is read into a model on any number of ranks, sharded or not: torch.distributed.checkpoint reads the slices that
a rank needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mambatrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_SHARDS = "shard-*.safetensors"


def missing_kind(names: set[str]) -> str | None:
    """The file that a checkpoint with these files lacks, or None; a missing shard is the manifest's to notice."""
    if any(Path(name).match(_SHARDS) for name in names):
        return None
    return next((name for name in (MODEL_FILE, OPTIMIZER_FILE) if name not in names), None)


def model_files(checkpoint: Path) -> list[Path]:
    """The files that hold a checkpoint's model."""
    whole = checkpoint / MODEL_FILE
    return [whole] if whole.is_file() else sorted(checkpoint.glob(_SHARDS))


def write_whole(folder: Path, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
    """Two files, by one process that has everything."""
    from safetensors.torch import save_file

    save_file(model, folder / MODEL_FILE, metadata={"format": "pt"})
    save_file(optimizer, folder / OPTIMIZER_FILE, metadata={"format": "pt"})


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """A file a rank; every rank calls it. What several ranks have is written by one of them.

    Raises:
        OSError: a rank could not write; raised on every rank.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError):
                raise failure from None
        raise


def read_into(checkpoint: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fills parameters (this rank's shards of them) in place and returns the optimizer's tensors, sharded alike.

    Raises:
        UserError: the checkpoint holds something else than these parameters.
    """
    import torch
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
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
