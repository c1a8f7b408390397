"""`export`: weights as a folder that other tools open."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mambatrain.cli.open_model import BaseOption


class Format(StrEnum):
    transformers = "transformers"
    mamba_ssm = "mamba-ssm"


class Stored(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


def export(
    weights: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_WEIGHTS", help="A run, an adapter, a transformers or mamba-ssm folder, or a hub name."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    format: Annotated[Format, typer.Option("--format", help="Which tool shall open it.")] = Format.transformers,
    dtype: Annotated[
        Stored, typer.Option("--dtype", help="bf16 halves the size; A_log, D, dt_bias and norms stay fp32.")
    ] = Stored.fp32,
    end_of_document: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="The token that ends a document. [default: the usual names]"),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of an adapter: write its base with the adapter in it, as whole weights.")
    ] = False,
    base: BaseOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder of weights at OUT.")] = False,
) -> None:
    """Write weights for another tool, open them with it and compare the logits before saying so.

    Example: mambatrain export runs/demo demo/export --format transformers
    """
    import sys

    import torch

    from mambatrain.adapters.open_weights import open_weights
    from mambatrain.cli.open_model import warn_of_damage
    from mambatrain.export.exporting import export_weights
    from mambatrain.export.mamba_ssm_folder import MAMBA_SSM
    from mambatrain.export.model_card import read_card_facts
    from mambatrain.export.transformers_folder import TRANSFORMERS

    _refuse_other_than_asked(weights, merge)
    read = open_weights(weights, base)
    warn_of_damage(read)
    print(f"exporting {read.origin}", file=sys.stderr)
    done = export_weights(
        read,
        out,
        TRANSFORMERS if format is Format.transformers else MAMBA_SSM,
        facts=read_card_facts(read),
        dtype=torch.bfloat16 if dtype is Stored.bf16 else torch.float32,
        end_of_document=end_of_document,
        overwrite=overwrite,
    )
    what = "already exported; nothing was written" if done.reused else "written"
    print(f"{what}, read by {done.reader}", file=sys.stderr)
    print(f"largest difference of logits: {done.largest_difference:.1e} of the largest", file=sys.stderr)
    print(done.folder)


def _refuse_other_than_asked(weights: str, merge: bool) -> None:
    """An adapter is merged when that is said, and nothing else is.

    Raises:
        UserError: it was not said, or there is nothing to merge.
    """
    from mambatrain.adapters.open_weights import find_adapter
    from mambatrain.errors import UserError

    found = find_adapter(Path(weights).expanduser())
    if found is not None and not merge:
        raise UserError(
            f"{weights} is an adapter, and an export is whole weights",
            "--merge writes those; PEFT opens the folder `adapter` in the run as it is",
        )
    if found is None and merge:
        raise UserError(f"--merge is for adapters, and {weights} is none", "leave it out")
