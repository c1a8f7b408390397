"""The tokenizer's files beside exported weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mambatrain.chats.template import ChatTemplate
from mambatrain.chats.template_files import own_template
from mambatrain.chats.turn_end import find_turn_end
from mambatrain.data.tokenizer import LoadedTokenizer, end_token_of_folder, load_tokenizer
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
    template: ChatTemplate | None
    """How messages become text; None: the weights were not trained on conversations."""
    turn_end_id: int | None
    """What ends an answer, where that is a token of its own."""

    @property
    def stop_ids(self) -> list[int]:
        """What ends a text that is generated."""
        ends = [self.end_of_document_id, *([] if self.turn_end_id is None else [self.turn_end_id])]
        return list(dict.fromkeys(ends))


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
        weights.tokenizer_file, end_of_document or end_token_of_folder(weights.tokenizer_file.parent)
    )
    if tokenizer.vocab_size > weights.section.padded_vocab_size:
        raise UserError(
            f"{tokenizer.file} has {tokenizer.vocab_size:,} tokens, the model {weights.section.padded_vocab_size:,}",
            "this is not the tokenizer that the weights were trained with",
        )
    template = own_template(tokenizer)
    return ExportTokenizer(
        tokenizer.file,
        tokenizer.sha256,
        tokenizer.end_of_document,
        tokenizer.end_of_document_id,
        tokenizer.tokenizer.encode(PROBE_TEXT, add_special_tokens=False).ids,
        template,
        None if template is None else _turn_end_id(template, tokenizer),
    )


def _turn_end_id(template: ChatTemplate, loaded: LoadedTokenizer) -> int | None:
    tokenizer = Tokenizer.from_str(loaded.tokenizer.to_str())
    tokenizer.encode_special_tokens = False
    try:
        return find_turn_end(template, tokenizer)[0]
    except UserError:  # a template whose answers cannot be told apart is handed on, without an end of them
        return None


def write_tokenizer(tokenizer: ExportTokenizer, folder: Path) -> None:
    """tokenizer.json as it is, a configuration that makes transformers read it as it is, and the chat template."""
    if tokenizer.template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.template.source, encoding="utf-8")
    shutil.copyfile(tokenizer.file, folder / "tokenizer.json")
    write_json_whole(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.template.bos_token if tokenizer.template else tokenizer.end_of_document,
            "eos_token": tokenizer.end_of_document,
            "pad_token": tokenizer.end_of_document,
            "clean_up_tokenization_spaces": False,
        },
    )
