"""A tokenizer and what the trainer needs to know about it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, models

from mambatrain.data.pretokenizers import PRETOKENIZER_NAMES, cut_text, safe_cut
from mambatrain.data.sentencepiece_model import load_sentencepiece
from mambatrain.data.sources import HUB_PREFIX, missing_file
from mambatrain.errors import UserError, nearest

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")

# Pieces of this length are encoded faster than whole chapters: what an encoding allocates stays in the caches.
PIECE_CHARACTERS = 4096
# An encoding takes up to 120 bytes of memory for a byte of text, so that a batch is kept to some 100 MB.
BATCH_CHARACTERS = 1_000_000
MAX_UNCUT_CHARACTERS = 4_000_000
"""The longest text that is encoded at once where the tokenizer does not let it be cut: some 500 MB of memory."""


@dataclass(frozen=True)
class LoadedTokenizer:
    """A `tokenizer.json` and its end-of-document token.

    Attributes:
        file: where it was read from.
        content: of a `tokenizer.json`: that file, or what was made of a SentencePiece model.
        sha256: digest of the content.
        vocab_size: highest token id + 1, added tokens included.
        cut: ends where a text may be cut so that its pieces give the tokens of the whole (`safe_cut`); None: nowhere.
    """

    tokenizer: Tokenizer
    file: Path
    content: bytes
    sha256: str
    vocab_size: int
    end_of_document: str
    end_of_document_id: int
    cut: re.Pattern[str] | None

    @property
    def cuts_at_newlines(self) -> bool:
        """Whether a text may be cut before each newline that follows anything but white space."""
        return self.cut is not None and self.cut.search("x\n") is not None

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Token ids of each text, (num_tokens,), on all cores.

        No special token is added, and a special token's name inside a text is encoded as the plain text it is.
        Memory is bounded whatever the number and the length of the texts.

        Raises:
            UserError: a text is longer than MAX_UNCUT_CHARACTERS and has no place to cut.
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

    def pieces(self, text: str) -> Iterator[str]:
        """Parts of a text that join to it, and whose tokens join to its tokens.

        Raises:
            UserError: one is longer than MAX_UNCUT_CHARACTERS.
        """
        for piece in [text] if self.cut is None else cut_text(text, PIECE_CHARACTERS, self.cut):
            if len(piece) > MAX_UNCUT_CHARACTERS:
                raise self._too_long(len(piece))
            yield piece

    def _too_long(self, num_characters: int) -> UserError:
        limit = f"more than the {MAX_UNCUT_CHARACTERS:,} that are encoded at once"
        if self.cut is not None:
            message = f"a text has {num_characters:,} characters without a place to cut, {limit}"
            return UserError(message, "put spaces or line ends into it, or split it into several documents")
        return UserError(
            f"a text has {num_characters:,} characters, {limit} with {self.file}",
            "split it into several documents; byte-level BPE that splits as "
            f"{', '.join(PRETOKENIZER_NAMES)} takes texts of any length",
        )

    def _pieces(self, texts: Sequence[str]) -> Iterator[tuple[int, str]]:
        for index, text in enumerate(texts):
            yield from ((index, piece) for piece in self.pieces(text))


def load_tokenizer(where: str | Path, end_of_document: str | None = None) -> LoadedTokenizer:
    """Reads a `tokenizer.json`, the one in a folder, a SentencePiece `.model`, or `hf://NAME[@REVISION]` of the hub.

    Args:
        end_of_document: name of the token that ends a document; None: the first of END_OF_DOCUMENT_NAMES it has.

    Raises:
        UserError: no such file, not a tokenizer, or it has no such token.
    """
    file = _download(str(where)) if str(where).startswith(HUB_PREFIX) else _tokenizer_file(Path(where))
    is_model = file.suffix == ".model"
    content = load_sentencepiece(file).to_str(pretty=True).encode() if is_model else file.read_bytes()
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
        content=content,
        sha256=hashlib.sha256(content).hexdigest(),
        vocab_size=max(vocabulary.values()) + 1,
        end_of_document=name,
        end_of_document_id=vocabulary[name],
        cut=safe_cut(tokenizer),
    )


def end_token_of_folder(folder: Path) -> str | None:
    """What a transformers folder says ends a text; None leaves it to the usual names."""
    try:
        token: Any = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


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


def with_special_tokens(loaded: LoadedTokenizer, names: Sequence[str]) -> LoadedTokenizer:
    """The tokenizer with further special tokens, whose ids follow the highest; those it has already stay as they are.

    Raises:
        UserError: the tokenizer cannot take them so.
    """
    before = loaded.tokenizer.get_vocab(with_added_tokens=True)
    new = [name for name in names if name not in before]
    if not new:
        return loaded
    tokenizer = _parse(loaded.file, loaded.content)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in new])
    after = tokenizer.get_vocab(with_added_tokens=True)
    if [after.get(name) for name in new] != list(range(loaded.vocab_size, loaded.vocab_size + len(new))):
        raise UserError(
            f"{loaded.file} cannot take new tokens: their ids would not follow its highest, {loaded.vocab_size - 1}",
            "name tokens that it has",
        )
    content = tokenizer.to_str(pretty=True).encode()
    inside = Tokenizer.from_buffer(content)
    inside.no_truncation()
    inside.no_padding()
    inside.encode_special_tokens = True
    return replace(
        loaded,
        tokenizer=inside,
        content=content,
        sha256=hashlib.sha256(content).hexdigest(),
        vocab_size=loaded.vocab_size + len(new),
    )


def tokens_behind(base: str | Path, extended: str | Path) -> list[str] | None:
    """What one tokenizer has behind the ids of another and is else the same; None: it is another tokenizer.

    Raises:
        UserError: one of them is not a tokenizer.
    """
    files = [_tokenizer_file(Path(where)) for where in (base, extended)]
    (before, how_before), (after, how_after) = (_meaning(_parse(file, file.read_bytes())) for file in files)
    behind = {name: number for name, number in after.items() if name not in before}
    same = all(after.get(name) == number for name, number in before.items()) and how_before == how_after
    first = max(before.values(), default=-1) + 1
    if not same or sorted(behind.values()) != list(range(first, first + len(behind))):
        return None
    return sorted(behind, key=lambda name: behind[name])


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


def _download(name: str) -> Path:
    """The `tokenizer.json` of a model on the hub, in the hub's own cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    try:
        return Path(hf_hub_download(repository, "tokenizer.json", revision=revision or None))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "hf://NAME[@REVISION] names a model of the hub that has a tokenizer.json"
        raise UserError(f"{name} cannot be read: {reason}", hint) from error


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
