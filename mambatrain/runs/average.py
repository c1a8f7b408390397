"""The mean of a run's last checkpoints, as a folder of weights: near the end of a run it often beats each of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mambatrain import __version__
from mambatrain.errors import UserError
from mambatrain.files import fsync_file, fsync_folder, sha256_of, write_errors_named, write_json_whole
from mambatrain.models.parameters import parameter_shapes
from mambatrain.recipe import ModelSection, read_recipe
from mambatrain.runs.checkpoint import find_damage, list_checkpoints, read_progress
from mambatrain.runs.checkpoint_tensors import MODEL_FILE, model_files, read_model_tensors
from mambatrain.runs.folder import RunFolder
from mambatrain.runs.formats import transformers
from mambatrain.runs.tensor_files import digest_of
from mambatrain.runs.weights import check_tensors

RECORD_FILE = "average.json"
"""What the mean was made of."""


@dataclass(frozen=True)
class Averaged:
    """A folder that was written."""

    folder: Path
    checkpoints: tuple[Path, ...]
    """Oldest first."""


def average_checkpoints(run: RunFolder, last: int, out: Path) -> Averaged:
    """Writes the plain mean of the newest checkpoints of a run: config.json, model.safetensors, tokenizer, provenance.

    Sums are fp64, one tensor of each checkpoint is read at a time; the mean has the dtype of the newest one.

    Args:
        run: the run.
        last: how many checkpoints, counted from the newest.
        out: the new folder; it appears whole or not at all.

    Raises:
        UserError: there are fewer checkpoints or one is damaged, or `out` is taken or cannot be written.
    """
    checkpoints = _newest(run, last)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists", "name a new folder")
    recipe = read_recipe(str(run.recipe_file))
    if recipe.adapter is not None:
        raise UserError(
            f"{run.path} trained an adapter: the mean of its factors is not the factors of the mean",
            "average runs that trained whole weights",
        )
    section = recipe.model
    tensors = mean_of(checkpoints, section)
    _write_whole(out.absolute(), out, tensors, section, run, checkpoints)
    return Averaged(out, tuple(checkpoints))


def mean_of(checkpoints: list[Path], section: ModelSection) -> dict[str, Tensor]:
    """Tensor by tensor, the mean of checkpoints of the model of `section`, in the dtype of the last one."""
    means: dict[str, Tensor] = {}
    for name in parameter_shapes(section):
        tensors = [tensor for file in checkpoints for tensor in read_model_tensors(file, [name]).values()]
        if len(tensors) == len(checkpoints):  # else it is missing, which is said below
            total = sum((other.double() for other in tensors[:-1]), tensors[-1].double())
            means[name] = (total / len(tensors)).to(tensors[-1].dtype)
    check_tensors(means, section, str(checkpoints[-1]))
    return means


def _newest(run: RunFolder, last: int) -> list[Path]:
    checkpoints = list_checkpoints(run.path)
    if len(checkpoints) < last:
        raise UserError(
            f"{run.path} has {len(checkpoints)} checkpoints, not {last}",
            f"lower --last, or train with --set checkpoint.keep_newest={last}",
        )
    chosen = checkpoints[-last:]
    if damages := [damage for checkpoint in chosen if (damage := find_damage(checkpoint))]:
        raise UserError(
            "a damaged checkpoint cannot be averaged:\n" + "\n".join(f"  {damage}" for damage in damages),
            "restore it or move its folder away, then average those that are left",
        )
    return chosen


def _write_whole(
    out: Path,
    named: Path,
    tensors: dict[str, Tensor],
    section: ModelSection,
    run: RunFolder,
    checkpoints: list[Path],
) -> None:
    from safetensors.torch import save_file

    writing = out.with_name(f".averaging-{out.name}")
    shutil.rmtree(writing, ignore_errors=True)  # of an earlier call that was killed
    try:
        with write_errors_named(named):
            writing.mkdir(parents=True)
            theirs = {transformers.NAMES.theirs(name): tensor for name, tensor in tensors.items()}
            save_file(theirs, writing / MODEL_FILE, metadata={"format": "pt"})
            fsync_file(writing / MODEL_FILE)
            for file in (run.tokenizer_file, *run.chat_files):
                if file.is_file():
                    shutil.copyfile(file, writing / file.name)
            write_json_whole(writing / RECORD_FILE, _provenance(run, checkpoints, writing / MODEL_FILE))
            dtype = str(tensors["embedding.weight"].dtype).removeprefix("torch.")
            write_json_whole(writing / "config.json", transformers.config_from_section(section, dtype, None))
            fsync_folder(writing)
            if out.exists():  # an empty folder
                out.rmdir()
            writing.replace(out)
            fsync_folder(out.parent)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def _provenance(run: RunFolder, checkpoints: list[Path], file: Path) -> dict[str, Any]:
    return {
        "made_by": f"mambatrain {__version__}, runs average",
        "run": str(run.path),
        "recipe_sha256": sha256_of(run.recipe_file),
        "mean": "uniform, summed in fp64",
        "checkpoints": [
            {
                "name": checkpoint.name,
                "step": progress.step,
                "tokens_seen": progress.tokens_seen,
                "model_sha256": digest_of(model_files(checkpoint)),
            }
            for checkpoint in checkpoints
            for progress in [read_progress(checkpoint)]
        ],
        "model_sha256": sha256_of(file),
    }
