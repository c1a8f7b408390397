"""Files that hold tensors by name, and which of them a folder of weights has; nothing read here can execute code."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambatrain.errors import UserError
from mambatrain.files import sha256_of

# In this order the first that is there is read. An index names the shards.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def find_tensor_files(folder: Path) -> list[Path]:
    """The file or shards with a folder's tensors, safetensors before pickles.

    Raises:
        UserError: there are none, or a shard is missing.
    """
    for name in _NAMES:
        file = folder / name
        if not file.is_file():
            continue
        if file.suffix != ".json":
            return [file]
        shards = sorted({str(shard) for shard in read_json(file).get("weight_map", {}).values()})
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise UserError(f"{file} names a shard that is not in the folder: {shard}", "fetch the folder again")
        return [folder / shard for shard in shards]
    raise UserError(f"{folder} holds no tensors", f"it needs one of {', '.join(_NAMES)}")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file or of a `pytorch_model.bin`, on the CPU.

    Raises:
        UserError: the file is damaged, or holds anything but tensors.
    """
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)


def digest_of(files: list[Path]) -> str:
    """SHA-256 of the file, as `sha256sum` prints it; of the digests where there are several files."""
    digests = [sha256_of(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def digest_of_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors on the CPU: their names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype};".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file is not one.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not readable JSON: {error}", "fetch or write the folder again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object", "fetch or write the folder again")
    return content


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}", "fetch or write it again") from error
    return tensors


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        # Files of torch before 1.6 are no zip archives and cannot be mapped into memory.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # the unpickler meets garbage with any of them
        # torch's own message advises weights_only=False, which would run whatever the file says.
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks to run {forbidden[1]}" if forbidden else f"it is damaged ({type(error).__name__})"
        raise UserError(f"{file} was refused: {reason}", "only plain tensors are read, never code") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{file} holds something else than tensors by name", "it should hold a state dict")
    return tensors
