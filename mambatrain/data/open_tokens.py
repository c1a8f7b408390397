"""Tokens to read, whoever wrote them: a folder of `mambatrain tokenize`, or a bare `.bin`/`.idx` pair of another tool.

A bare pair has no manifest: nothing says which tokenizer made it, how many bytes its text has, or whether its
documents end in a token. The first two stay unknown, the third is read off its documents.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.sources import missing_file
from mambatrain.data.token_corpus import MANIFEST_NAME, TOKENIZER_NAME, TokenCorpus, open_token_corpus
from mambatrain.data.token_shards import TokenShard, shard_files
from mambatrain.errors import UserError, nearest
from mambatrain.recipe.chat_section import PAIRS

DOCUMENTS_LOOKED_AT = 65_536  # for an end token, spread over the pair
DIGEST_BLOCKS = 1024  # of a bare pair's tokens, spread over the file: whole corpora take hours to read
DIGEST_BLOCK_BYTES = 65_536


@dataclass(frozen=True)
class Tokens:
    """Open tokens.

    Attributes:
        where: as the user named them.
        train: the shard to train on.
        held_out: the shard to measure on; None where there is none.
        train_bytes, held_out_bytes: (num_documents,) int64, UTF-8 bytes of each document; None: not known.
        tokenizer_file: what made the tokens; None: not known.
        vocab_size: highest id + 1 of that tokenizer; None: not known.
        digest: hex. Of every token where a manifest has it, else of the index and of blocks spread over the tokens.
        corpus: the folder with its manifest; None for a bare pair.
    """

    where: Path
    train: TokenShard
    held_out: TokenShard | None
    train_bytes: NDArray[np.int64] | None
    held_out_bytes: NDArray[np.int64] | None
    tokenizer_file: Path | None
    vocab_size: int | None
    digest: str
    corpus: TokenCorpus | None

    @property
    def shards(self) -> dict[str, TokenShard]:
        """Name -> shard, in reading order."""
        return {"train": self.train} | ({} if self.held_out is None else {"held_out": self.held_out})

    @property
    def holds_pairs(self) -> bool:
        """Whether documents are the chosen and the rejected conversations of preference pairs, in turn."""
        chats = None if self.corpus is None else self.corpus.manifest.chats
        return chats is not None and chats.options.format == PAIRS

    def text_bytes(self, split: str) -> NDArray[np.int64] | None:
        """`train_bytes` or `held_out_bytes`."""
        return self.train_bytes if split == "train" else self.held_out_bytes


def open_tokens(where: str | Path, vocab_size: int | None = None) -> Tokens:
    """Opens a folder that `tokenize` wrote, a bare pair by its prefix, or a folder that holds one.

    A folder may hold one pair, or two that are named `train` and `held_out`.

    Args:
        where: the folder, or the path of a pair without `.bin` or `.idx` (with either is understood, too).
        vocab_size: ids of a bare pair must lie below it as they are read; None: any id may come.

    Raises:
        UserError: nothing there, or it is truncated or damaged.
    """
    place = Path(where)
    if place.is_dir() and (place / MANIFEST_NAME).is_file():
        return _of_corpus(place, open_token_corpus(place))
    prefix = place.with_suffix("") if place.suffix in {".bin", ".idx"} else place
    if any(file.is_file() for file in shard_files(prefix)):
        return _of_pairs(place, prefix, None, vocab_size)
    if not place.is_dir():
        close = nearest(place.name, sorted(path.stem for path in place.parent.glob("*.idx")))
        if close:
            raise UserError(f"{place} does not exist", f"did you mean {place.parent / close}?")
        raise missing_file(place, "name a folder that `mambatrain tokenize` wrote, or a .bin/.idx pair without ending")
    prefixes = sorted(path.with_suffix("") for path in place.glob("*.idx") if path.with_suffix(".bin").is_file())
    names = [path.name for path in prefixes]
    if len(prefixes) == 1:
        return _of_pairs(place, prefixes[0], None, vocab_size)
    if names == ["held_out", "train"]:
        return _of_pairs(place, prefixes[1], prefixes[0], vocab_size)
    if not prefixes:
        raise UserError(
            f"{place} holds no {MANIFEST_NAME} and no .bin/.idx pair",
            "`mambatrain tokenize SOURCE... --out FOLDER` makes tokens",
        )
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise UserError(f"{place} holds {len(prefixes)} .bin/.idx pairs: {shown}", f"name one, for example {prefixes[0]}")


def find_end_id(shard: TokenShard) -> int | None:
    """The id that every document looked at ends in; None where they differ, or there are not two to compare.

    Empty documents end in nothing and are passed over.
    """
    filled = np.flatnonzero(shard.document_lengths)
    if len(filled) < 2:
        return None
    looked_at = filled[np.linspace(0, len(filled) - 1, min(len(filled), DOCUMENTS_LOOKED_AT)).astype(np.int64)]
    ids = np.unique(shard.last_ids(looked_at))
    return int(ids[0]) if len(ids) == 1 else None


def _of_corpus(where: Path, corpus: TokenCorpus) -> Tokens:
    return Tokens(
        where=where,
        train=corpus.train,
        held_out=corpus.held_out,
        train_bytes=corpus.train_bytes,
        held_out_bytes=corpus.held_out_bytes,
        tokenizer_file=corpus.tokenizer_file,
        vocab_size=corpus.vocab_size,
        digest=corpus.digest,
        corpus=corpus,
    )


def _of_pairs(where: Path, train: Path, held_out: Path | None, vocab_size: int | None) -> Tokens:
    prefixes = [train] if held_out is None else [train, held_out]
    shards = [TokenShard(prefix, vocab_size) for prefix in prefixes]
    for shard in shards:
        shard.end_id = find_end_id(shards[0])  # a handful of held-out documents may agree by chance
        shard.ends_marked = shard.end_id is not None
    tokenizer_file = train.with_name(TOKENIZER_NAME)
    return Tokens(
        where=where,
        train=shards[0],
        held_out=shards[1] if held_out is not None else None,
        train_bytes=None,
        held_out_bytes=None,
        tokenizer_file=tokenizer_file if tokenizer_file.is_file() else None,
        vocab_size=None,
        digest=_digest(shards),
        corpus=None,
    )


def _digest(shards: list[TokenShard]) -> str:
    digest = hashlib.sha256()
    for shard in shards:
        num_bytes = shard.num_tokens * shard.dtype.itemsize
        digest.update(f"{shard.dtype.name} {num_bytes} {shard.num_documents} ".encode())
        for part in np.array_split(shard.document_starts, 64):  # where documents begin is what the index adds
            digest.update(np.ascontiguousarray(part).data)
        last = max(num_bytes - DIGEST_BLOCK_BYTES, 0)
        with shard.file.open("rb") as file:
            for place in np.unique(np.linspace(0, last, DIGEST_BLOCKS).astype(np.int64)):
                file.seek(int(place))
                digest.update(file.read(DIGEST_BLOCK_BYTES))
    return digest.hexdigest()
