"""What the reference of preference training gives to each answer: computed once from the starting weights, and kept.

One safetensors file holds it for the pairs of a folder, named by the digest of what it depends on, so that a resume and
every run of the same weights and pairs find it (`preferences.references`).
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mambatrain.data.batches import MicroBatch
from mambatrain.data.pair_rows import PairRows
from mambatrain.errors import UserError
from mambatrain.evaluation.held_out import evaluating
from mambatrain.files import write_bytes_whole, write_errors_named
from mambatrain.recipe import CHATS
from mambatrain.training.build import build_model, fill_parameters
from mambatrain.training.metrics import print_fact
from mambatrain.training.preference_loss import answer_log_probabilities

if TYPE_CHECKING:
    from mambatrain.models.language_model import LanguageModel
    from mambatrain.recipe import Recipe
    from mambatrain.runs.folder import RunFolder
    from mambatrain.training.assemble import Parts

VERSION = 1  # of what is computed; another one is computed anew
SECONDS_BETWEEN_LINES = 5.0


def give_references(recipe: Recipe, parts: Parts, folder: RunFolder, quiet: bool) -> None:
    """Sets `references` of the pairs' shards: read where they are kept, else computed by all ranks together, and kept.

    They come from the weights that the run started from, whatever it has made of them since; with an adapter, from the
    weights that it stands on. Kernels and precision are the run's own, so that a run begins with margins of 0.

    Raises:
        UserError: the file cannot be written.
    """
    assert recipe.preferences is not None and parts.weights is not None
    accelerator, tokens = parts.accelerator, parts.data.sources[CHATS]
    depends_on = {
        "format": f"mambatrain references {VERSION}",
        "weights": parts.weights.digest,
        "pairs": tokens.digest,
        "precision": parts.resolved.precision,
        "kernels": parts.backend.name,
    }
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    file = Path(recipe.preferences.references or folder.chats) / f"references-{key[:16]}.safetensors"
    sizes = {split: shard.num_documents for split, shard in tokens.shards.items()}
    kept = read_references(file, key, sizes)
    found = torch.tensor([float(kept is not None)], device=accelerator.device)
    if float(accelerator.reduce(found, "sum")) < accelerator.num_processes:  # all ranks compute, or none
        kept = _compute(recipe, parts, quiet)
        if accelerator.is_main_process:
            write_references(file, key, kept)
    assert kept is not None
    if accelerator.is_main_process and not quiet:
        print_fact("reference", f"log-probabilities of {sum(sizes.values()) // 2:,} pairs, kept in {file}")
    for split, shard in tokens.shards.items():
        shard.references = kept[split].numpy()


def read_references(file: Path, key: str, sizes: dict[str, int]) -> dict[str, Tensor] | None:
    """What is kept: split -> (num_documents,) fp64. None: it is missing, damaged, or of something else.

    Args:
        file: where.
        key: digest of what it depends on.
        sizes: split -> documents.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            record = opened.metadata() or {}
            found = {split: opened.get_tensor(split) for split in sizes}
    except (OSError, SafetensorError):
        return None
    right = {split: ((size,), torch.float64) for split, size in sizes.items()}
    if {split: (tuple(value.shape), value.dtype) for split, value in found.items()} != right:
        return None
    return found if record == {"key": key, "sha256": _digest(found)} else None


def write_references(file: Path, key: str, references: dict[str, Tensor]) -> None:
    """The inverse of `read_references`; the file appears whole.

    Raises:
        UserError: it cannot be written.
    """
    from safetensors.torch import save

    with write_errors_named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_whole(file, save(references, {"key": key, "sha256": _digest(references)}))


def _digest(references: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(references[split].numpy().tobytes() for split in sorted(references))).hexdigest()


def _compute(recipe: Recipe, parts: Parts, quiet: bool) -> dict[str, Tensor]:
    """Split -> (num_documents,) fp64, the same on each rank, each of which has gone through its share of the pairs."""
    accelerator, device = parts.accelerator, parts.accelerator.device
    settled = recipe.recomputing(parts.resolved.recompute_every)
    model = build_model(settled, parts.backend, device, parts.resolved.precision, shards=1)
    fill_parameters(model, recipe, parts.weights)
    references = {}
    for split, shard in parts.data.sources[CHATS].shards.items():
        rows = PairRows(shard, recipe.data.row_tokens)
        found = torch.zeros(rows.num_windows, 2, dtype=torch.float64)
        mine = np.arange(accelerator.process_index, rows.num_windows, accelerator.num_processes, dtype=np.int64)
        last_told = time.monotonic()
        for first in range(0, len(mine), parts.resolved.micro_batch_rows):
            windows = mine[first : first + parts.resolved.micro_batch_rows]
            with accelerator.autocast():
                found[windows] = _log_probabilities(model, rows.rows(windows).to(device)).cpu()
            if accelerator.is_main_process and not quiet and time.monotonic() - last_told > SECONDS_BETWEEN_LINES:
                last_told = time.monotonic()
                print_fact("reference", f"{split}: {first + len(windows):,} of {len(mine):,} pairs")
        # Each pair is in one rank's share and 0 in the others': the sum is exact.
        references[split] = accelerator.reduce(found.to(device), "sum").cpu().flatten()
    if not all(bool(values.isfinite().all()) for values in references.values()):
        raise UserError("the reference gives some answers no finite probability", "look at the weights: `evaluate`")
    return references


def _log_probabilities(model: LanguageModel, batch: MicroBatch) -> Tensor:
    """(B, 2) fp64."""
    with evaluating(model):
        return answer_log_probabilities(model, batch.tokens, batch.boundaries, batch.targets)[0]
