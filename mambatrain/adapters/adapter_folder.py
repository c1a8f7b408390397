"""An adapter as a folder that PEFT opens, as far as PEFT has what it is.

adapter_config.json          PEFT's LoraConfig
adapter_model.safetensors    lora_A, lora_B and magnitudes under PEFT's names of transformers' modules
tuned_tensors.safetensors    the parameters that were trained themselves, under transformers' names; where there are any
tokenizer.json, chat_template.jinja, tokenizer_config.json    of an adapter for conversations: how they are spelled
mambatrain.json              whose adapter it is, by digest; the adapter section; digests of the files; written last

PEFT 0.21 opens in_proj, x_proj, embedding and lm_head. It refuses out_proj, runs dt_proj without effect, and knows
nothing of the second file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from mambatrain.adapters.attach import adapted_weights, trained_shapes, tuned_parameters
from mambatrain.errors import UserError
from mambatrain.files import (
    explaining_full_disk,
    fsync_file,
    fsync_folder,
    sha256_of,
    write_bytes_whole,
    write_json_whole,
)
from mambatrain.recipe import AdapterSection, ModelSection
from mambatrain.runs.formats import transformers
from mambatrain.runs.tensor_files import read_tensors

CONFIG_FILE = "adapter_config.json"
FACTORS_FILE = "adapter_model.safetensors"
TUNED_FILE = "tuned_tensors.safetensors"
RECORD_FILE = "mambatrain.json"
FORMAT = "mambatrain adapter 1"
_AGAIN = "fetch or write the folder again"


@dataclass(frozen=True)
class Base:
    """The weights that an adapter stands on."""

    origin: str
    """Where they were."""
    digest: str
    """`Weights.digest`"""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as read."""

    adapter: AdapterSection
    base: Base
    tensors: dict[str, Tensor]
    """By the names of a checkpoint."""
    digest: str
    """Of the tensors' files."""


def write_adapter_folder(
    folder: Path,
    adapter: AdapterSection,
    model: ModelSection,
    base: Base,
    trained: dict[str, Tensor],
    beside: Sequence[Path] = (),
) -> None:
    """Writes a folder whole; an earlier one of an adapter is replaced.

    Args:
        beside: files that are copied into it: the tokenizer and the chat template of conversations.

    Raises:
        UserError: the disk is full.
    """
    from safetensors.torch import save

    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with explaining_full_disk(f"adapter {folder}"):
            temporary.mkdir(parents=True)
            # Bytes, not save_file: that lets nobody but the owner read.
            write_bytes_whole(temporary / FACTORS_FILE, save(_peft_tensors(adapter, model, trained), {"format": "pt"}))
            if tuned := tuned_parameters(adapter, model):
                theirs = {transformers.NAMES.theirs(name): trained[name].cpu().contiguous() for name in tuned}
                write_bytes_whole(temporary / TUNED_FILE, save(theirs, {"format": "pt"}))
            write_json_whole(temporary / CONFIG_FILE, _peft_config(adapter, model, base))
            for file in beside:
                write_bytes_whole(temporary / file.name, file.read_bytes())
            names = sorted(path.name for path in temporary.iterdir())
            record = {
                "format": FORMAT,
                "base": {"origin": base.origin, "sha256": base.digest},
                "adapter": adapter.model_dump(mode="json"),
                "files": {name: sha256_of(temporary / name) for name in names},
            }
            write_json_whole(temporary / RECORD_FILE, record)
            for name in (*names, RECORD_FILE):
                fsync_file(temporary / name)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.replace(folder)
            fsync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_record(folder: Path) -> tuple[AdapterSection, Base]:
    """What an adapter is and whose; its files are checked against their digests.

    Raises:
        UserError: PEFT itself or another tool wrote it, or it is damaged.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        raise UserError(
            f"{folder} holds an adapter that mambatrain did not write: nothing says which weights it is for",
            "merge it with PEFT (merge_and_unload), and name the folder of the result",
        )
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(f"{folder} is an adapter of another version of mambatrain", "write it again")
        adapter = AdapterSection.model_validate(record["adapter"])
        base = Base(str(record["base"]["origin"]), str(record["base"]["sha256"]))
        files = {str(name): str(digest) for name, digest in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise UserError(f"{file} is not readable: {error}", _AGAIN) from error
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing", _AGAIN)
        if sha256_of(folder / name) != digest:
            raise UserError(f"{folder / name} was changed: its digest is not that of {RECORD_FILE}", _AGAIN)
    return adapter, base


def read_factors(folder: Path, adapter: AdapterSection, model: ModelSection) -> dict[str, Tensor]:
    """The tensors of an adapter folder by the names of a checkpoint.

    Raises:
        UserError: they are not those of such an adapter on such a model.
    """
    found = read_tensors(folder / FACTORS_FILE)
    if tuned_parameters(adapter, model):
        found |= read_tensors(folder / TUNED_FILE)
    tensors = {}
    for name, shape in trained_shapes(adapter, model).items():
        tensor = found.get(_peft_name(name))
        if tensor is None or tuple(tensor.shape) != shape:
            said = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}, not {shape}"
            raise UserError(f"{folder} does not fit its base: {_peft_name(name)} is {said}", _AGAIN)
        tensors[name] = tensor
    return tensors


def _peft_tensors(adapter: AdapterSection, model: ModelSection, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for name in adapted_weights(adapter, model):
        for part in ("lora_A", "lora_B", "magnitude"):
            if (full := f"{name}.{part}") in trained:
                tensors[_peft_name(full)] = trained[full].cpu().contiguous()
    if "embedding.lora_A" in trained and model.tie_embeddings:
        # PEFT has the tied head as a module of its own, whose factors are the embedding's the other way round.
        head = "base_model.model.lm_head"
        tensors[f"{head}.lora_A.weight"] = trained["embedding.lora_B"].T.cpu().contiguous()
        tensors[f"{head}.lora_B.weight"] = trained["embedding.lora_A"].T.cpu().contiguous()
    return tensors


def _peft_name(name: str) -> str:
    """`embedding.lora_A` -> `base_model.model.backbone.embeddings.lora_embedding_A`; that of a tuned tensor, too."""
    module, _, part = name.rpartition(".")
    if part not in {"lora_A", "lora_B", "magnitude"}:
        return transformers.NAMES.theirs(name)
    theirs = transformers.NAMES.theirs(f"{module}.").removesuffix(".")
    if part == "magnitude":
        return f"base_model.model.{theirs}.lora_magnitude_vector"
    if module == "embedding":
        return f"base_model.model.{theirs}.{part.replace('lora_', 'lora_embedding_')}"
    return f"base_model.model.{theirs}.{part}.weight"


def _peft_config(adapter: AdapterSection, model: ModelSection, base: Base) -> dict[str, Any]:
    targets = [{"embedding": "embeddings"}.get(name, name) for name in adapter.targets_in(model)]
    tied = "embeddings" in targets and model.tie_embeddings
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.origin,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rank_stabilised,
        "use_dora": adapter.kind == "dora",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [*targets, *(["lm_head"] if tied else [])],
        "ensure_weight_tying": tied,
    }
