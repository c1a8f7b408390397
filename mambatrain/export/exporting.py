"""Export: write a folder, open it with the tool it is for, compare, and only then give it its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mambatrain.export.comparison import cast_weights, check_tensors, largest_difference, our_logits
from mambatrain.export.model_card import CardFacts, write_model_card
from mambatrain.export.out_folder import Exported, MadeOf, find_finished_export, placing_whole, write_record
from mambatrain.export.tokenizer_files import ExportTokenizer, find_fitting_tokenizer, write_tokenizer
from mambatrain.runs.weights import Weights


@dataclass(frozen=True)
class Target:
    """A tool that opens what is written; one file of this package for each."""

    name: str
    """As --format says it."""
    library: str | None
    """The name that model hubs have for it."""
    how_to_load: str
    """Python for the model card; {name} is the folder's."""
    write: Callable[[Path, Weights, ExportTokenizer | None], None]
    """Writes configuration and tensors into a folder, in the dtypes they have."""
    read_logits: Callable[[Path, Weights, ExportTokenizer | None], tuple[str, Tensor]]
    """Opens the folder as a user would; says what opened it, and its fp32 logits of `fixed_tokens`."""


def export_weights(
    weights: Weights,
    out: Path,
    target: Target,
    *,
    facts: CardFacts | None = None,
    dtype: torch.dtype = torch.float32,
    end_of_document: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes `out`, or keeps the one that is there and made of the same.

    Args:
        weights: what to export, with its tokenizer.
        out: the new folder.
        target: who shall open it.
        facts: what the model card tells beside the architecture.
        dtype: of what is stored. With bf16 the parameters that the table keeps in fp32 are stored in fp32.
        end_of_document: name of the token that begins and ends a text; None looks for the usual ones.
        overwrite: replace a folder of weights at `out`.

    Raises:
        UserError: `out` is taken, the target cannot represent the model, the tokenizer does not fit, the disk is full,
            or what the target computes differs from what we do. Nothing is left at `out` then.
    """
    tokenizer = find_fitting_tokenizer(weights, end_of_document)
    end_name = tokenizer.end_of_document if tokenizer else None
    dtype_name = str(dtype).removeprefix("torch.")
    template = tokenizer.template if tokenizer else None
    made_of = MadeOf(
        weights.digest,
        target.name,
        dtype_name,
        tokenizer.sha256 if tokenizer else None,
        end_name,
        template.sha256 if template else None,
    )
    if finished := find_finished_export(out, made_of):
        return finished
    stored = cast_weights(weights, dtype)
    with placing_whole(out, overwrite) as folder:
        target.write(folder, stored, tokenizer)
        if tokenizer:
            write_tokenizer(tokenizer, folder)
        write_model_card(
            folder / "README.md",
            out.absolute().name,
            weights.section,
            facts or CardFacts(),
            library=target.library,
            how_to_load=target.how_to_load,
            dtype=dtype_name,
            end_of_document=end_name,
            talks=template is not None,
        )
        check_tensors(folder, stored)
        reader, theirs = target.read_logits(folder, stored, tokenizer)
        difference = largest_difference(theirs, our_logits(stored), reader)
        write_record(folder, made_of, reader, difference)
    return Exported(out, False, reader, difference)
