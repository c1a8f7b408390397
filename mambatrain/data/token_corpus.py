"""A folder of tokens as `mambatrain tokenize` wrote it: two shards, the bytes of each document, tokenizer, manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.manifest import ShardRecord, TokenManifest, read_manifest
from mambatrain.data.sources import missing_file
from mambatrain.data.token_shards import TokenShard, token_dtype
from mambatrain.errors import UserError
from mambatrain.files import sha256_of

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
SPLITS = ("train", "held_out")
DATA_FILES = (*(f"{split}{ending}" for split in SPLITS for ending in (".bin", ".idx", ".bytes.npy")), TOKENIZER_NAME)
"""Every file of the folder but the manifest, which records them."""
TEMPLATE_NAME = "chat_template.jinja"
CHAT_FILES = (*DATA_FILES, *(f"{split}.counted.npy" for split in SPLITS), TEMPLATE_NAME, "tokenizer_config.json")
"""The same of a folder of conversations: beside each shard stands which of its tokens are trained on."""

_MAKE_AGAIN = "copy it again, or make it again with `mambatrain tokenize ... --overwrite`"


@dataclass(frozen=True)
class TokenCorpus:
    """An open folder of tokens. Document 0 of each shard is a single end-of-document token with 0 bytes of text.

    Attributes:
        train_bytes, held_out_bytes: (num_documents,) int64, UTF-8 bytes of each document's text.
    """

    folder: Path
    manifest: TokenManifest
    train: TokenShard
    held_out: TokenShard
    train_bytes: NDArray[np.int64]
    held_out_bytes: NDArray[np.int64]

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that made the tokens."""
        return self.folder / TOKENIZER_NAME

    @property
    def digest(self) -> str:
        """Of both shards, and of what counts in them, as the manifest has them: hex."""
        endings = (".bin",) if self.manifest.chats is None else (".bin", ".counted.npy")
        shards = "".join(self.manifest.files[f"{split}{ending}"].sha256 for ending in endings for split in SPLITS)
        return hashlib.sha256(shards.encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Highest id that the tokenizer may give, + 1."""
        return self.manifest.tokenizer.vocab_size

    @property
    def end_of_document_id(self) -> int:
        """The token behind every document."""
        return self.manifest.tokenizer.end_of_document_id


def open_token_corpus(folder: str | Path) -> TokenCorpus:
    """Opens a folder that `tokenize` wrote; sizes, counts, the end tokens' places and the tokenizer are checked.

    Ids are checked as they are read (`TokenShard.tokens`), and every byte by `verify_token_corpus`.

    Raises:
        UserError: naming the file that is missing, truncated, or does not fit the others.
    """
    place = Path(folder)
    if not place.is_dir():
        if not place.exists():
            raise missing_file(place, f"`mambatrain tokenize SOURCE... --out {place}` makes it")
        raise UserError(f"{place} is a file, not a folder of tokens", f"name the folder: {place.parent}")
    if not (place / MANIFEST_NAME).is_file():
        raise UserError(
            f"{place} holds no {MANIFEST_NAME}", "`mambatrain tokenize SOURCE... --out FOLDER` makes tokens"
        )
    manifest = read_manifest(place / MANIFEST_NAME, TokenManifest)
    _check_files(place, manifest)
    shards = {split: TokenShard(place / split, manifest.tokenizer.vocab_size) for split in SPLITS}
    lengths = {split: _open_bytes(place / f"{split}.bytes.npy") for split in SPLITS}
    for split, record in (("train", manifest.train), ("held_out", manifest.held_out)):
        if manifest.chats is None:
            shards[split].end_id = manifest.tokenizer.end_of_document_id
        else:
            shards[split].ends_marked = False
            shards[split].counted = _open_counted(place / f"{split}.counted.npy", shards[split])
        _check_shard(place, shards[split], lengths[split], record, manifest)
    return TokenCorpus(place, manifest, shards["train"], shards["held_out"], lengths["train"], lengths["held_out"])


def verify_token_corpus(corpus: TokenCorpus) -> None:
    """Compares every file with its digest.

    Raises:
        UserError: naming each file that was changed since it was written.
    """
    changed = [
        str(corpus.folder / name)
        for name, record in corpus.manifest.files.items()
        if sha256_of(corpus.folder / name) != record.sha256
    ]
    if changed:
        raise UserError(f"{', '.join(changed)}: not the bytes that were written", _MAKE_AGAIN)


def _check_files(place: Path, manifest: TokenManifest) -> None:
    manifest_file = place / MANIFEST_NAME
    expected = DATA_FILES if manifest.chats is None else CHAT_FILES
    if set(manifest.files) != set(expected):
        raise UserError(f"{manifest_file} does not record the files {', '.join(expected)}", _MAKE_AGAIN)
    for name, record in manifest.files.items():
        if not (place / name).is_file():
            raise UserError(f"{place / name} does not exist", _MAKE_AGAIN)
        size = (place / name).stat().st_size
        if size != record.num_bytes:
            raise UserError(
                f"{place / name} has {size:,} bytes where the manifest says {record.num_bytes:,}", _MAKE_AGAIN
            )
    if sha256_of(place / TOKENIZER_NAME) != manifest.tokenizer.sha256:
        raise UserError(f"{place / TOKENIZER_NAME} is not the tokenizer that made these tokens", _MAKE_AGAIN)
    if manifest.dtype != token_dtype(manifest.tokenizer.vocab_size).name:
        raise UserError(f"{manifest_file}: ids of {manifest.dtype} do not fit its tokenizer's vocabulary", _MAKE_AGAIN)
    if manifest.tokenizer.end_of_document_id >= manifest.tokenizer.vocab_size:
        raise UserError(f"{manifest_file}: the end-of-document token lies outside the vocabulary", _MAKE_AGAIN)


def _check_shard(
    place: Path, shard: TokenShard, lengths: NDArray[np.int64], record: ShardRecord, manifest: TokenManifest
) -> None:
    if shard.dtype.name != manifest.dtype:
        raise UserError(f"{shard.file} holds {shard.dtype.name} where the manifest says {manifest.dtype}", _MAKE_AGAIN)
    num_documents = record.num_documents + (manifest.chats is None)  # and the opening one
    if (shard.num_documents, shard.num_tokens) != (num_documents, record.num_tokens):
        raise UserError(f"{shard.file} and {place / MANIFEST_NAME} count tokens or documents differently", _MAKE_AGAIN)
    if lengths.shape != (shard.num_documents,) or int(lengths.sum()) != record.num_bytes:
        raise UserError(f"{shard.prefix}.bytes.npy does not fit the documents of {shard.file}", _MAKE_AGAIN)
    if manifest.chats is not None:
        return
    ends = [int(shard.tokens(at, at + 1)[0]) for at in (0, shard.num_tokens - 1)]
    if ends != [manifest.tokenizer.end_of_document_id] * 2 or shard.document_lengths[0] != 1:
        raise UserError(f"{shard.file} does not begin and end with the end-of-document token", _MAKE_AGAIN)


def _open_bytes(file: Path) -> NDArray[np.int64]:
    return _open_array(file, np.dtype(np.int64))


def _open_counted(file: Path, shard: TokenShard) -> NDArray[np.bool_]:
    counted = _open_array(file, np.dtype(np.bool_))
    if counted.shape != (shard.num_tokens,):
        raise UserError(f"{file} does not fit the tokens of {shard.file}", _MAKE_AGAIN)
    return counted


def _open_array(file: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{file} is damaged: {error}", _MAKE_AGAIN) from error
    if values.dtype != dtype:
        raise UserError(f"{file} holds {values.dtype}, not {dtype}", _MAKE_AGAIN)
    return np.asarray(values)


def may_be_computed_anew(name: str) -> bool:
    """Whether a file of a token folder is a packing (packing.py), or what a reference gives to its pairs
    (training/references.py), or the part of one that a killed process left.

    It stands here because `tokenize` asks it, which loads no torch: that would be most of its memory.
    """
    name = name.removeprefix(".").removesuffix(".partial")
    is_packing = ".best_fit-" in name and name.endswith((".npy", ".json"))
    return is_packing or (name.startswith("references-") and name.endswith(".safetensors"))


def is_token_folder(folder: Path) -> bool:
    """Whether a folder holds what `tokenize` writes and nothing else, so that it may be replaced."""
    known = {*CHAT_FILES, MANIFEST_NAME}
    return (folder / MANIFEST_NAME).is_file() and all(
        entry.name in known or may_be_computed_anew(entry.name) for entry in folder.iterdir()
    )
