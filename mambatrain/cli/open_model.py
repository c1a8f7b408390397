"""What `evaluate` and `generate` share: weights on a device, and the tokenizer that belongs to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mambatrain.data.open_tokens import Tokens
    from mambatrain.data.tokenizer import LoadedTokenizer
    from mambatrain.generation.token_step import TokenStep
    from mambatrain.models.language_model import LanguageModel
    from mambatrain.ops.backends import Backend
    from mambatrain.runs.weights import Weights

WeightsArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_WEIGHTS",
        help="A run, a checkpoint in one, an adapter, a transformers or mamba-ssm folder, or a hub name.",
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="WEIGHTS", help="Of an adapter: what it was trained on. [default: where that was]"),
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="FILE", help="tokenizer.json, where none lies beside the weights."),
]
EndOption = Annotated[
    str | None,
    typer.Option("--end-of-document", metavar="TOKEN", help="The token that ends a document. [default: looked up]"),
]


@dataclass(frozen=True)
class OpenModel:
    """A model ready to run, in fp32."""

    model: LanguageModel
    weights: Weights
    backend: Backend


def open_model(where: str, kernels: str, device: str, base: str | None = None) -> OpenModel:
    """Loads weights, or an adapter merged into its base, onto a device; says on stderr what, and what it runs on."""
    from mambatrain.adapters.open_weights import open_weights
    from mambatrain.devices import choose_device, keep_freed_memory
    from mambatrain.ops.backends import choose_backend
    from mambatrain.runs.weights import build_model

    chosen: Any = device
    place = choose_device(chosen)
    if place.type == "cpu":
        keep_freed_memory()
    backend = choose_backend(kernels, place)
    weights = open_weights(where, base)
    model = build_model(weights, backend, place)
    model.eval()
    warn_of_damage(weights)
    typer.echo(f"weights  {weights.origin}", err=True)
    typer.echo(f"kernels  {backend.name} on {place}: {backend.reason}", err=True)
    return OpenModel(model, weights, backend)


def record_step(opened: OpenModel, boundary_id: int | None) -> TokenStep | None:
    """On CUDA the step by which tokens are read one by one, where it can be recorded; says on stderr what is done."""
    from mambatrain.generation.token_step import TokenStep, why_not_recorded

    if opened.model.head_weight.device.type != "cuda":
        return None
    missing = why_not_recorded(opened.model)
    if missing is None:
        try:
            step = TokenStep(opened.model, boundary_id)
        except RuntimeError as error:
            missing = f"CUDA refuses to record one ({str(error).strip().splitlines()[0]})"
        else:
            typer.echo("decoding by a CUDA graph, one for each token", err=True)
            return step
    typer.echo(f"decoding without a CUDA graph, which is slower: {missing}", err=True)
    return None


def warn_of_damage(weights: Weights) -> None:
    """Says on stderr which newer checkpoints of a run were passed over."""
    for damage in weights.damaged:
        typer.echo(f"warning  {damage}; an older checkpoint is used", err=True)


def open_tokenizer(opened: OpenModel, file: Path | None, end_of_document: str | None) -> LoadedTokenizer:
    """The tokenizer that was asked for, else the one beside the weights, with the end token that their folder names.

    Raises:
        UserError: there is none, it is not that of the weights, it knows more ids than the model has rows, or it has no
            token that ends a document.
    """
    from mambatrain.data.tokenizer import load_tokenizer
    from mambatrain.errors import UserError
    from mambatrain.export.tokenizer_files import find_fitting_tokenizer

    weights = replace(opened.weights, tokenizer_file=_tokenizer_of(opened.weights, file))
    fitting = find_fitting_tokenizer(weights, end_of_document) if weights.tokenizer_file else None
    if fitting is None:
        raise UserError(
            f"no tokenizer.json lies beside {weights.origin}",
            "name the one that the model was trained with: --tokenizer FILE",
        )
    return load_tokenizer(fitting.file, fitting.end_of_document)


def refuse_other_tokenizer(weights: Weights, asked: Path | None, tokens: Tokens) -> None:
    """Ids of one tokenizer mean nothing to a model of another.

    Weights without a tokenizer are taken to have the tokens' own, as far as their number of ids allows it.

    Args:
        weights: the model's.
        asked: the tokenizer.json that the user says belongs to the weights, if any.
        tokens: to be read; whose tokenizer is not known, are taken to have the weights' own.

    Raises:
        UserError: the weights have another tokenizer than the tokens.
    """
    from mambatrain.data.tokenizer import encode_alike
    from mambatrain.errors import UserError

    rows = weights.section.padded_vocab_size
    if tokens.vocab_size is not None and tokens.vocab_size > rows:
        raise UserError(
            f"{tokens.where} has {tokens.vocab_size:,} token ids, but {weights.origin} has only {rows:,} rows",
            "tokenize the text with the tokenizer of the model",
        )
    file = _tokenizer_of(weights, asked)
    if file is not None and tokens.tokenizer_file is not None and not encode_alike(file, tokens.tokenizer_file):
        raise UserError(
            f"{tokens.where} was tokenized with another tokenizer than that of {weights.origin}",
            f"tokenize the text again with --tokenizer {file}",
        )


def _tokenizer_of(weights: Weights, asked: Path | None) -> Path | None:
    """What the user asked for, once it is known to be that of the weights; else what lies beside them."""
    from mambatrain.data.tokenizer import encode_alike
    from mambatrain.errors import UserError

    own = weights.tokenizer_file
    if asked is None or own is None:
        return asked or own
    if not encode_alike(asked, own):
        raise UserError(
            f"--tokenizer {asked} is another tokenizer than that of {weights.origin}",
            f"leave it out: {own} is taken",
        )
    return asked
