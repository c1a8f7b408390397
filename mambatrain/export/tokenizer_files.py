"""The tokenizer's files beside exported weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambatrain.data.tokenizer import LoadedTokenizer, load_tokenizer
from mambatrain.errors import UserError
from mambatrain.files import write_json_whole
from mambatrain.runs.weights import Weights

# Has what tokenizers stumble over: indentation, no end of line, accents, other scripts, digits, rare signs.
PROBE_TEXT = "def f(x):\n    return x ** 2  # naïve\n\nThe 12,345 cats' \t“mats” — 猫は好き? 🐈"


@dataclass(frozen=True)
class ExportTokenizer:
    """A tokenizer that fits the weights."""

    file: Path
    sha256: str
    end_of_document: str
    end_of_document_id: int
    probe_ids: list[int]
    """PROBE_TEXT in tokens."""


def find_fitting_tokenizer(weights: Weights, end_of_document: str | None) -> ExportTokenizer | None:
    """The weights' tokenizer, None where they have none.

    Raises:
        UserError: it has more tokens than the model, or no token that ends a document.
    """
    if weights.tokenizer_file is None:
        if end_of_document is not None:
            raise UserError(
                f"{weights.origin} has no tokenizer.json, so --end-of-document says nothing", "leave it out"
            )
        return None
    tokenizer: LoadedTokenizer = load_tokenizer(
        weights.tokenizer_file, end_of_document or _end_token_of_folder(weights.tokenizer_file.parent)
    )
    if tokenizer.vocab_size > weights.section.padded_vocab_size:
        raise UserError(
            f"{tokenizer.file} has {tokenizer.vocab_size:,} tokens, the model {weights.section.padded_vocab_size:,}",
            "this is not the tokenizer that the weights were trained with",
        )
    return ExportTokenizer(
        tokenizer.file,
        tokenizer.sha256,
        tokenizer.end_of_document,
        tokenizer.end_of_document_id,
        tokenizer.tokenizer.encode(PROBE_TEXT, add_special_tokens=False).ids,
    )


def write_tokenizer(tokenizer: ExportTokenizer, folder: Path) -> None:
    """tokenizer.json as it is, and a configuration that makes transformers read it as it is."""
    shutil.copyfile(tokenizer.file, folder / "tokenizer.json")
    write_json_whole(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.end_of_document,
            "eos_token": tokenizer.end_of_document,
            "pad_token": tokenizer.end_of_document,
            "clean_up_tokenization_spaces": False,
        },
    )


def _end_token_of_folder(folder: Path) -> str | None:
    """What a transformers folder says ends a text; None leaves it to the usual names."""
    try:
        token: Any = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
