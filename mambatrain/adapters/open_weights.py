"""Weights wherever they lie, adapters included: base and adapter, merged, are weights like any other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from mambatrain.adapters.adapter_folder import CONFIG_FILE, Base, read_factors, read_record
from mambatrain.adapters.attach import merge_adapter, trained_shapes
from mambatrain.errors import UserError
from mambatrain.recipe import AdapterSection, Recipe, read_recipe
from mambatrain.runs.checkpoint import MANIFEST_FILE, find_damage, newest_valid_checkpoint
from mambatrain.runs.checkpoint_tensors import MODEL_FILE
from mambatrain.runs.folder import RunFolder
from mambatrain.runs.tensor_files import digest_of_tensors, read_tensors
from mambatrain.runs.weights import Weights, read_weights
from mambatrain.runs.weights import refuse_no_weights as refuse_no_whole_weights


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter before its base is read."""

    origin: str
    adapter: AdapterSection
    base: Base
    folder: Path | None
    """PEFT's format; None: a run's checkpoint."""
    file: Path
    """That holds the tensors, or names them."""
    tokenizer_file: Path | None
    damaged: tuple[str, ...] = ()


def open_weights(where: str, base: str | None = None) -> Weights:
    """Reads what `read_weights` reads, and adapters: runs that trained one, their checkpoints, folders of them.

    Args:
        where: weights or an adapter.
        base: where the adapter's base lies; None: where it was when the adapter was made.

    Raises:
        UserError: nothing there can be read, or the base is not that of the adapter, or it is a trained state.
    """
    found = find_adapter(Path(where).expanduser())
    if found is None:
        if base is not None:
            raise UserError(f"--base is for adapters, and {where} is none", "leave it out")
        return read_weights(where)
    if found.adapter.kind == "state":
        file = RunFolder(Path(where)).tuned_state
        raise UserError(
            f"{where} trained a state; its weights are still those of {found.base.origin}",
            f"name those, and --state {file}",
        )
    return _merge(found, _read_base(found, base))


def refuse_no_weights(where: str) -> None:
    """Raises what `open_weights` would where nothing here can be weights or an adapter; reads no tensors."""
    if find_adapter(Path(where).expanduser()) is None:
        refuse_no_whole_weights(where)


def find_adapter(path: Path) -> FoundAdapter | None:
    """The adapter that a path names; None where it names anything else.

    Raises:
        UserError: there is one, and it is damaged.
    """
    if (path / CONFIG_FILE).is_file():
        adapter, base = read_record(path)
        places = (RunFolder(place).tokenizer_file for place in (path, path.parent))  # its own, or that of its run
        tokenizer = next((file for file in places if file.is_file()), None)
        return FoundAdapter(str(path), adapter, base, path, path / CONFIG_FILE, tokenizer)
    run, checkpoint = RunFolder(path), None
    if (path / MANIFEST_FILE).is_file():
        run, checkpoint = RunFolder(path.parent.parent), path
    if not run.exists():
        return None
    recipe = read_recipe(str(run.recipe_file))
    return None if recipe.adapter is None else _of_run(run, recipe, recipe.adapter, checkpoint)


def _of_run(run: RunFolder, recipe: Recipe, adapter: AdapterSection, checkpoint: Path | None) -> FoundAdapter:
    damaged: list[str] = []
    if checkpoint is None:
        checkpoint = newest_valid_checkpoint(run.path, damaged)
        if checkpoint is None:
            what = "; ".join(damaged) if damaged else "it was stopped before its first checkpoint"
            raise UserError(f"run {run.path} has no whole checkpoint: {what}", "continue it with `mambatrain finetune`")
    elif damage := find_damage(checkpoint):
        raise UserError(
            f"checkpoint {checkpoint} cannot be used: {damage}", "name the run to take its newest whole one"
        )
    try:
        started = json.loads(run.facts_file.read_text(encoding="utf-8"))["started_from"]
        base = Base(str(started["origin"]), str(started["digest"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.facts_file} does not say what the adapter stands on", "restore it") from error
    tokenizer = run.tokenizer_file if run.tokenizer_file.is_file() else None
    return FoundAdapter(str(checkpoint), adapter, base, None, checkpoint / MODEL_FILE, tokenizer, tuple(damaged))


def _read_base(found: FoundAdapter, asked: str | None) -> Weights:
    where = asked or found.base.origin
    try:
        base = open_weights(where)
    except UserError as error:
        if asked is not None:
            raise
        raise UserError(
            f"{found.origin} is an adapter, and its base cannot be read: {error.message}", "name it: --base WEIGHTS"
        ) from error
    if base.digest != found.base.digest:
        raise UserError(
            f"{found.origin} is an adapter for other weights: {found.base.origin} ({found.base.digest[:12]}), "
            f"not {base.origin} ({base.digest[:12]})",
            "name those that it was trained on: --base WEIGHTS (of a run that went on, the checkpoint)",
        )
    return base


def _merge(found: FoundAdapter, base: Weights) -> Weights:
    adapter, shapes = found.adapter, trained_shapes(found.adapter, base.section)
    if found.folder is not None:
        trained = read_factors(found.folder, adapter, base.section)
    else:
        trained = read_tensors(found.file)
        if {name: tuple(tensor.shape) for name, tensor in trained.items()} != shapes:
            raise UserError(f"{found.file} does not hold what its recipe trains", "restore the run")
    # The same for a run's checkpoint and for the folder that was made of it: a state file fits both.
    content = f"{base.digest} {adapter.kind} {adapter.scale!r} {digest_of_tensors(trained)}"
    return replace(
        base,
        tensors=merge_adapter(base.tensors, adapter, base.section, trained),
        tokenizer_file=_tokenizer_of(found, base),
        origin=found.origin,
        digest=hashlib.sha256(content.encode()).hexdigest(),
        damaged=found.damaged,
    )


def _tokenizer_of(found: FoundAdapter, base: Weights) -> Path | None:
    """The adapter's where a chat template lies beside it: conversations are spelled as they were in its training."""
    own = found.tokenizer_file
    if own is not None and RunFolder(own.parent).chat_files[0].is_file():
        return own
    return base.tokenizer_file or own
