"""A tokenizer and what the trainer needs to know about it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models

from mambatrain.data.sources import missing_file
from mambatrain.errors import UserError, nearest

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")

# An encoding takes about 25 bytes of memory for a byte of text, so that a batch is kept to some 200 MB; a piece of a
# long document is long enough for its overhead to vanish and short enough to keep all cores busy.
BATCH_CHARACTERS = 8_000_000
PIECE_CHARACTERS = 65_536

_LINE_END = re.compile(r"\S\n")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A `tokenizer.json` and its end-of-document token.

    Attributes:
        file: where it was read from.
        sha256: digest of that file's bytes.
        vocab_size: highest token id + 1, added tokens included.
        cuts_at_newlines: a newline that follows anything but white space always starts a new pre-token, so that a
            long document may be encoded in pieces that start there: the tokens are the same.
    """

    tokenizer: Tokenizer
    file: Path
    sha256: str
    vocab_size: int
    end_of_document: str
    end_of_document_id: int
    cuts_at_newlines: bool

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Token ids of each text, (num_tokens,), on all cores.

        No special token is added, and a special token's name inside a text is encoded as the plain text it is.
        Memory is bounded whatever the number and (where `cuts_at_newlines`) the length of the texts.
        """
        pieces: list[list[NDArray[np.int32]]] = [[] for _ in texts]
        for batch in _batches(self._pieces(texts)):
            encodings = self.tokenizer.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (index, _), encoding in zip(batch, encodings, strict=True):
                pieces[index].append(np.array(encoding.ids, dtype=np.int32))
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are spelled out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _pieces(self, texts: Sequence[str]) -> Iterator[tuple[int, str]]:
        for index, text in enumerate(texts):
            if self.cuts_at_newlines:
                yield from ((index, piece) for piece in cut_at_newlines(text, PIECE_CHARACTERS))
            else:
                yield index, text


def load_tokenizer(where: str | Path, end_of_document: str | None = None) -> LoadedTokenizer:
    """Reads a `tokenizer.json`, or the one in a folder.

    Args:
        end_of_document: name of the token that ends a document; None: the first of END_OF_DOCUMENT_NAMES it has.

    Raises:
        UserError: no such file, not a tokenizer, or it has no such token.
    """
    file = _tokenizer_file(Path(where))
    content = file.read_bytes()
    tokenizer = _parse(file, content)
    # A file may carry settings of the model it was made for; here text is encoded whole, and always the same way.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise UserError(f"{file} is a tokenizer without tokens", "`mambatrain tokenizer train` makes one with them")
    name = _end_of_document(tokenizer, vocabulary, file, end_of_document)
    return LoadedTokenizer(
        tokenizer=tokenizer,
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        vocab_size=max(vocabulary.values()) + 1,
        end_of_document=name,
        end_of_document_id=vocabulary[name],
        cuts_at_newlines=_cuts_at_newlines(tokenizer),
    )


def encode_alike(one: str | Path, other: str | Path) -> bool:
    """Whether two tokenizers (files or folders) give a text the same ids.

    Their files may differ in their bytes, as when transformers has written one of them again: what counts is the id of
    each token, how text is normalized and split, and the merges.

    Raises:
        UserError: one of them is not a tokenizer.
    """
    files = [_tokenizer_file(Path(where)) for where in (one, other)]
    contents = [file.read_bytes() for file in files]
    if contents[0] == contents[1]:
        return True
    first, second = (_parse(file, content) for file, content in zip(files, contents, strict=True))
    return _meaning(first) == _meaning(second)


def cut_at_newlines(text: str, num_characters: int) -> list[str]:
    """Pieces that join to the text, cut before newlines that follow anything but white space.

    A piece ends at the first such place from its `num_characters`-th character on, so that it may be longer.
    """
    pieces, start = [], 0
    while len(text) - start > num_characters:
        line_end = _LINE_END.search(text, start + num_characters - 1)
        if line_end is None:
            break
        pieces.append(text[start : line_end.start() + 1])
        start = line_end.start() + 1
    pieces.append(text[start:])
    return pieces


def _batches(pieces: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    characters = 0
    for index, piece in pieces:
        batch.append((index, piece))
        characters += len(piece)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            others = sorted(file.name for file in path.glob("*.json"))
            hint = f"name one of its files: {', '.join(others)}" if others else "`mambatrain tokenizer train` makes one"
            raise UserError(f"{path} holds no tokenizer.json", hint)
        return path / "tokenizer.json"
    if not path.exists():
        raise missing_file(path, "`mambatrain tokenizer train` makes a tokenizer")
    if not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder", "name a tokenizer.json")
    return path


def _parse(file: Path, content: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(content)
    except ValueError as error:
        hint = "it must be in the format of Hugging Face tokenizers (`tokenizer.json`)"
        raise UserError(f"{file} is not a tokenizer: {error}", hint) from error


def _meaning(tokenizer: Tokenizer) -> tuple[dict[str, int], list[Any]]:
    """What decides the ids of a text."""
    parts = json.loads(tokenizer.to_str())
    return tokenizer.get_vocab(with_added_tokens=True), [
        parts["normalizer"],
        parts["pre_tokenizer"],
        parts["model"].get("merges"),
    ]


def _end_of_document(tokenizer: Tokenizer, vocabulary: dict[str, int], file: Path, asked: str | None) -> str:
    if asked is not None:
        if asked in vocabulary:
            return asked
        added = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())
        close = nearest(asked, added)
        hint = f"did you mean {close}?" if close else f"its special tokens are: {', '.join(added[:10]) or 'none'}"
        raise UserError(f"{file} has no token {asked}", hint)
    for name in END_OF_DOCUMENT_NAMES:
        if name in vocabulary:
            return name
    names = ", ".join(END_OF_DOCUMENT_NAMES)
    raise UserError(f"{file} has no token that ends a document (looked for {names})", "--end-of-document names another")


def _cuts_at_newlines(tokenizer: Tokenizer) -> bool:
    r"""Whether the tokenizer splits text by GPT-2's pattern, on whose account `\S\n` is always split in the middle.

    Of the pattern's alternatives none matches white space behind anything else, none looks behind, and `\s+(?!\S)`
    looks ahead from white space only. NFC composes nothing with a newline. An added token that is not special could
    still reach across a newline, or strip white space at its sides.
    """
    parts = json.loads(tokenizer.to_str())
    pre_tokenizer, normalizer = parts["pre_tokenizer"] or {}, parts["normalizer"]
    return (
        pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex") is True
        and pre_tokenizer.get("add_prefix_space") is False
        and (normalizer is None or normalizer == {"type": "NFC"})
        and not any(
            token["lstrip"] or token["rstrip"] or token["single_word"] or "\n" in token["content"]
            for token in parts["added_tokens"]
            if not token["special"]
        )
    )
