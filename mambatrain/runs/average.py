"""The mean of a run's last checkpoints, as a folder of weights: near the end of a run it often beats each of them."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mambatrain import __version__
from mambatrain.errors import UserError
from mambatrain.files import fsync_file, fsync_folder, sha256_of, write_errors_named, write_json_whole
from mambatrain.recipe import ModelSection, read_recipe
from mambatrain.runs.checkpoint import MODEL_FILE, find_damage, list_checkpoints, read_progress
from mambatrain.runs.folder import RunFolder
from mambatrain.runs.formats import transformers
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
    tensors = mean_of([checkpoint / MODEL_FILE for checkpoint in checkpoints], section)
    _write_whole(out.absolute(), out, tensors, section, run, checkpoints)
    return Averaged(out, tuple(checkpoints))


def mean_of(files: list[Path], section: ModelSection) -> dict[str, Tensor]:
    """Tensor by tensor, the mean of files that all hold the model of `section`, in the dtype of the last file."""
    from safetensors import safe_open

    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        means: dict[str, Tensor] = {}
        for name in opened[-1].keys():  # noqa: SIM118  (no dict)
            newest = opened[-1].get_tensor(name)
            total = sum((other.get_tensor(name).double() for other in opened[:-1]), newest.double())
            means[name] = (total / len(files)).to(newest.dtype)
    check_tensors(means, section, str(files[-1]))
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
            if run.tokenizer_file.is_file():
                shutil.copyfile(run.tokenizer_file, writing / "tokenizer.json")
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
                "model_sha256": sha256_of(checkpoint / MODEL_FILE),
            }
            for checkpoint in checkpoints
            for progress in [read_progress(checkpoint)]
        ],
        "model_sha256": sha256_of(file),
    }
