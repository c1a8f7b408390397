"""The model alone, wherever it lies: a run, a checkpoint of one, a transformers or mamba-ssm folder, a name on the hub.

Everything is checked against the model that its configuration describes before it is used: names, shapes, settings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mambatrain.errors import UserError
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import parameter_rows, parameter_shapes, stored_dtype
from mambatrain.ops.backends import Backend
from mambatrain.recipe import ModelSection, read_recipe
from mambatrain.runs.checkpoint import MANIFEST_FILE, find_damage, newest_valid_checkpoint
from mambatrain.runs.checkpoint_tensors import MODEL_FILE, model_files, read_model_tensors
from mambatrain.runs.folder import RunFolder
from mambatrain.runs.formats import mamba_ssm, transformers
from mambatrain.runs.formats.tables import NameTable
from mambatrain.runs.tensor_files import digest_of, find_tensor_files, read_json, read_tensors

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_KINDS = "a run, a checkpoint in one, a transformers folder, a mamba-ssm folder, or a hub name such as org/name"
_OTHER_MODEL = "configuration and tensors are of two models: fetch or write the folder again"


@dataclass(frozen=True)
class Weights:
    """A model's tensors under our names, as they were stored."""

    section: ModelSection
    tensors: dict[str, Tensor]
    """Every parameter once: a tied head is the embedding alone."""
    tokenizer_file: Path | None
    """tokenizer.json beside the weights."""
    origin: str
    """Where they came from, for people."""
    digest: str
    """SHA-256 of the file that holds the tensors; of the files' digests where there are several."""
    damaged: tuple[str, ...] = ()
    """What is wrong with newer checkpoints of the run, which were passed over."""


def read_weights(where: str) -> Weights:
    """Reads the weights of a run (its newest whole checkpoint), checkpoint, foreign folder or hub name.

    Raises:
        UserError: there is nothing there that can be read, or it does not fit our model: the file, setting or tensor
            is named.
    """
    path = Path(where).expanduser()
    if not path.exists():
        path = _download(where)
    match _kind_of(path, where):
        case "run":
            return _read_run(path)
        case "checkpoint":
            return _read_checkpoint(path, RunFolder(path.parent.parent))
        case "foreign":
            return _read_foreign(path)


def refuse_no_weights(where: str) -> None:
    """Raises what `read_weights` would where nothing here can be weights; reads no tensors and asks no hub."""
    path = Path(where).expanduser()
    if path.exists():
        _kind_of(path, where)
    else:
        _refuse_no_hub_name(where)


def load_model(
    where: str, backend: Backend, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> tuple[LanguageModel, Weights]:
    """Reads weights and makes a model of them; see `read_weights` and `build_model`."""
    weights = read_weights(where)
    return build_model(weights, backend, device, dtype), weights


def build_model(
    weights: Weights, backend: Backend, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A model of its own tensors; at a narrow dtype, what the parameter table keeps in fp32 stays fp32."""
    with torch.device("meta"):
        model = LanguageModel(weights.section, backend)
    rows = parameter_rows(weights.section)
    tensors = {
        name: tensor.to(device=device, dtype=stored_dtype(rows[name], dtype), copy=True)
        for name, tensor in weights.tensors.items()
    }
    model.load_state_dict(tensors, assign=True)
    return model


def _kind_of(path: Path, where: str) -> Literal["run", "checkpoint", "foreign"]:
    if not path.is_dir():
        raise UserError(f"{where} is a file, not a folder with weights", f"name {_KINDS}")
    if RunFolder(path).exists():
        return "run"
    if (path / MANIFEST_FILE).is_file() and RunFolder(path.parent.parent).exists():
        return "checkpoint"
    if (path / "config.json").is_file():
        return "foreign"
    raise UserError(
        f"{where} holds neither recipe.yaml nor config.json, so it is no folder of weights", f"name {_KINDS}"
    )


def _read_run(run: Path) -> Weights:
    damaged: list[str] = []
    checkpoint = newest_valid_checkpoint(run, damaged)
    if checkpoint is None:
        what = "; ".join(damaged) if damaged else "it was stopped before its first checkpoint"
        raise UserError(f"run {run} has no whole checkpoint: {what}", "continue it with `mambatrain pretrain`")
    return replace(_read_checkpoint(checkpoint, RunFolder(run), known_whole=True), damaged=tuple(damaged))


def _read_checkpoint(checkpoint: Path, run: RunFolder, known_whole: bool = False) -> Weights:
    damage = None if known_whole else find_damage(checkpoint)
    if damage is not None:
        raise UserError(
            f"checkpoint {checkpoint} cannot be used: {damage}", "name the run to take its newest whole one"
        )
    recipe = read_recipe(str(run.recipe_file))
    section = recipe.model
    if recipe.adapter is not None:
        raise UserError(f"{checkpoint} holds an adapter, not whole weights", "mambatrain export --merge makes them")
    files = model_files(checkpoint)
    whole = files[0].name == MODEL_FILE
    tensors = read_tensors(files[0]) if whole else read_model_tensors(checkpoint, parameter_shapes(section))
    check_tensors(tensors, section, str(files[0] if whole else checkpoint))
    tokenizer = run.tokenizer_file if run.tokenizer_file.is_file() else None
    return Weights(section, tensors, tokenizer, str(checkpoint), digest_of(files))


def _read_foreign(folder: Path) -> Weights:
    config_file = folder / "config.json"
    config = read_json(config_file)
    names: NameTable
    if transformers.recognises(config):
        names, section = transformers.NAMES, transformers.section_from_config(config, str(config_file))
    elif mamba_ssm.recognises(config):
        names, section = mamba_ssm.NAMES, mamba_ssm.section_from_config(config, str(config_file))
    else:
        raise UserError(
            f"{config_file} describes no model that mambatrain has (model_type = {config.get('model_type')!r})",
            "it reads transformers' mamba and mamba2, and mamba-ssm's Mamba1 and Mamba2",
        )
    files = find_tensor_files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            ours = names.ours(name)
            if ours is None:
                raise UserError(f"{file} holds a tensor that the model does not have: {name}", _OTHER_MODEL)
            tensors[ours] = tensor
    _drop_tied_head(tensors, section, str(folder))
    check_tensors(tensors, section, str(folder), names)
    tokenizer = folder / "tokenizer.json"
    return Weights(section, tensors, tokenizer if tokenizer.is_file() else None, str(folder), digest_of(files))


def _drop_tied_head(tensors: dict[str, Tensor], section: ModelSection, origin: str) -> None:
    """Some tools write a tied head as well; it has to be the embedding."""
    if not section.tie_embeddings or not {"lm_head.weight", "embedding.weight"} <= tensors.keys():
        return
    if not torch.equal(tensors.pop("lm_head.weight"), tensors["embedding.weight"]):
        raise UserError(
            f"{origin} says that the head is the embedding, but lm_head.weight differs from it", _OTHER_MODEL
        )


def check_tensors(
    tensors: dict[str, Tensor], section: ModelSection, origin: str, names: NameTable | None = None
) -> None:
    """Refuses tensors that are not those of the model; `names` says what the user calls them.

    Raises:
        UserError: naming what is missing, left over or of another shape.
    """
    shapes = parameter_shapes(section)

    def named(wrong: list[str]) -> str:
        shown = [name if names is None else names.theirs(name) for name in wrong[:5]]
        return ", ".join(shown) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")

    if missing := [name for name in shapes if name not in tensors]:
        raise UserError(f"{origin} lacks tensors of the model it describes: {named(missing)}", _OTHER_MODEL)
    if unexpected := [name for name in tensors if name not in shapes]:
        raise UserError(f"{origin} holds tensors that the model does not have: {named(unexpected)}", _OTHER_MODEL)
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{origin}: {named([name])} has shape {tuple(tensors[name].shape)}, the model's is {shape}",
                _OTHER_MODEL,
            )


def _refuse_no_hub_name(name: str) -> None:
    first = name.split("/", maxsplit=1)[0]
    if not _HUB_NAME.fullmatch(name) or first in {".", ".."} or Path(first).is_dir():
        raise UserError(f"there is no folder {name}", f"name {_KINDS}")


def _download(name: str) -> Path:
    """Fetches a repository of the hub into its cache; what is there already is not fetched again."""
    _refuse_no_hub_name(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    metadata = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "*.index.json"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*metadata, "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*metadata, "pytorch_model*.bin"]))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} is no folder here, and it could not be fetched from the hub: {reason}",
            "check the name and the connection, or name a folder",
        ) from error
    return folder
