"""Several folders of tokens into one, and one dealt anew into what is trained on and what is held out.

Documents are copied one after the other; in memory are 12 bytes for each. The folder appears whole or not at all.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.manifest import Combination, CombinedFrom, FileRecord, ShardRecord, TokenManifest
from mambatrain.data.open_tokens import Tokens, open_tokens
from mambatrain.data.permutation import permute
from mambatrain.data.progress import ByteProgress
from mambatrain.data.shuffle_documents import num_held_out
from mambatrain.data.staging import StagedFolder
from mambatrain.data.token_corpus import (
    DATA_FILES,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    is_token_folder,
    open_token_corpus,
)
from mambatrain.data.token_shards import TokenShard, TokenShardWriter, shard_files
from mambatrain.data.tokenizer import encode_alike
from mambatrain.errors import UserError
from mambatrain.files import fsync_file, sha256_of, write_bytes_whole, write_errors_named

DOCUMENTS_AT_ONCE = 65_536  # whose order is computed at once


@dataclass(frozen=True)
class _Document:
    """Where a document comes from, and where it goes."""

    part: int
    split: str
    index: int
    goes_to: str


def merge_tokens(folders: Sequence[str | Path], out: str | Path, seed: int = 0, overwrite: bool = False) -> Tokens:
    """One folder of the documents of several: those trained on, and those held out.

    Documents of different parts alternate at random, so that the beginning is like the whole; those of one part keep
    their order.

    Raises:
        UserError: a part is named twice, was tokenized otherwise than the first, or `out` is in use.
    """
    if len(folders) < 2:
        raise UserError(f"{len(folders)} folder cannot be merged", "name two or more")
    parts = [_open_text(folder) for folder in folders]
    for number, part in enumerate(parts):
        for other in parts[:number]:
            if part.train.file.resolve() == other.train.file.resolve():
                raise UserError(f"{part.where} is named twice", "name each folder once")
        _refuse_unlike(parts[0], part)
    return _combine("merge", parts, _merged(parts, seed), Path(out), seed, None, overwrite)


def split_tokens(
    folder: str | Path, held_out: float, out: str | Path, seed: int = 0, overwrite: bool = False
) -> Tokens:
    """All documents of a folder, trained on and held out before, dealt anew; they keep their order.

    Args:
        folder: of `tokenize`, or a bare pair.
        held_out: fraction of the documents to hold out, rounded up.
        out: the new folder.
        seed: decides which.
        overwrite: replace a folder of tokens.

    Raises:
        UserError: fewer than two documents, or `out` is in use.
    """
    tokens = _open_text(folder)
    return _combine("split", [tokens], _split(tokens, held_out, seed), Path(out), seed, held_out, overwrite)


def _open_text(folder: str | Path) -> Tokens:
    tokens = open_tokens(folder)
    if tokens.train.counted is not None:
        raise UserError(
            f"{folder} holds conversations, which are not merged or split",
            "name all of their files in data.chats.files; data.chats.held_out splits them",
        )
    return tokens


def _merged(parts: Sequence[Tokens], seed: int) -> Iterator[_Document]:
    for split in ("train", "held_out"):
        shards = {number: part.shards[split] for number, part in enumerate(parts) if split in part.shards}
        following = {number: shard.num_opening for number, shard in shards.items()}
        counts = [shard.num_documents - following[number] for number, shard in shards.items()]
        numbers, ends = list(shards), np.cumsum(counts)
        for places in _blocks(int(ends[-1]) if len(ends) else 0):
            drawn = permute(places, int(ends[-1]), seed)
            for row in np.searchsorted(ends, drawn, side="right").tolist():
                number = numbers[row]
                yield _Document(number, split, following[number], split)
                following[number] += 1


def _split(tokens: Tokens, fraction: float, seed: int) -> Iterator[_Document]:
    counts = {split: shard.num_documents - shard.num_opening for split, shard in tokens.shards.items()}
    total = sum(counts.values())
    num_kept = total - num_held_out(total, fraction)
    if total < 2:
        raise UserError(f"{tokens.where} has {total} documents, too few to split", "name a folder of two or more")
    before = 0
    for split, count in counts.items():
        for places in _blocks(count):
            held_out = permute(before + places, total, seed) >= num_kept
            for place, out in zip(places.tolist(), held_out.tolist(), strict=True):
                yield _Document(0, split, tokens.shards[split].num_opening + place, "held_out" if out else "train")
        before += count


def _blocks(count: int) -> Iterator[NDArray[np.int64]]:
    for first in range(0, count, DOCUMENTS_AT_ONCE):
        yield np.arange(first, min(first + DOCUMENTS_AT_ONCE, count), dtype=np.int64)


def _combine(
    verb: Literal["merge", "split"],
    parts: Sequence[Tokens],
    documents: Iterator[_Document],
    out: Path,
    seed: int,
    held_out: float | None,
    overwrite: bool,
) -> Tokens:
    with write_errors_named(out), StagedFolder(out) as staged:
        _refuse_used(out, parts, overwrite)
        with (
            TokenShardWriter(staged.path / "train", parts[0].train.dtype) as train,
            TokenShardWriter(staged.path / "held_out", parts[0].train.dtype) as measured,
        ):
            writers = {"train": train, "held_out": measured}
            text_bytes = _copy(parts, documents, writers)
        if parts[0].tokenizer_file is not None:
            write_bytes_whole(staged.path / TOKENIZER_NAME, parts[0].tokenizer_file.read_bytes())
        if parts[0].corpus is None:
            if not measured.num_documents:  # bare pairs need no second one
                for file in shard_files(measured.prefix):
                    file.unlink()
            open_tokens(staged.path)
        else:
            for split, counts in text_bytes.items():
                np.save(staged.path / f"{split}.bytes.npy", np.frombuffer(counts, dtype=np.int64).astype("<i8"))
                fsync_file(staged.path / f"{split}.bytes.npy")
            _write_manifest(verb, parts, staged.path, writers, text_bytes, seed, held_out)
            open_token_corpus(staged.path)
        staged.publish()
    return open_tokens(out)


def _copy(
    parts: Sequence[Tokens], documents: Iterator[_Document], writers: dict[str, TokenShardWriter]
) -> dict[str, array[int]]:
    """Copies documents to their writers; gives the bytes of text of each, the opening end token's 0 first."""
    text_bytes = {split: array("q") for split in writers}
    total = sum(shard.num_tokens * shard.dtype.itemsize for part in parts for shard in part.shards.values())
    known = [{split: part.text_bytes(split) for split in part.shards} for part in parts]
    end_id, opens = parts[0].train.end_id, any(s.num_opening for part in parts for s in part.shards.values())
    if opens:
        for split, writer in writers.items():
            writer.append(np.array([end_id]))
            text_bytes[split].append(0)
    done = 0
    with ByteProgress("copying documents", total) as progress:
        for document in documents:
            shard: TokenShard = parts[document.part].shards[document.split]
            ids = shard.document(document.index)
            writers[document.goes_to].append(ids)
            counts = known[document.part][document.split]
            if counts is not None:
                text_bytes[document.goes_to].append(int(counts[document.index]))
            done += len(ids) * shard.dtype.itemsize
            progress.advance_to(done)
    return text_bytes


def _write_manifest(
    verb: Literal["merge", "split"],
    parts: Sequence[Tokens],
    folder: Path,
    writers: dict[str, TokenShardWriter],
    text_bytes: dict[str, array[int]],
    seed: int,
    held_out: float | None,
) -> None:
    manifests = [part.corpus.manifest for part in parts if part.corpus is not None]
    records = {
        split: ShardRecord(
            num_documents=writer.num_documents - 1, num_tokens=writer.num_tokens, num_bytes=sum(text_bytes[split])
        )
        for split, writer in writers.items()
    }
    # Whatever a manifest counts over its sources (documents left out, changed, ...), the sum counts over all of them.
    counted = [name for name, field in TokenManifest.model_fields.items() if name.startswith("num_")]
    combined = manifests[0].model_copy(
        update={
            "sources": [record for manifest in manifests for record in manifest.sources],
            **{name: sum(getattr(manifest, name) for manifest in manifests) for name in counted},
            **records,
            "combined": Combination(
                verb=verb,
                seed=seed,
                held_out=held_out,
                parts=[CombinedFrom(folder=str(part.where), digest=part.digest) for part in parts],
            ),
            "files": {
                name: FileRecord(num_bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
                for name in DATA_FILES
            },
        }
    )
    checked = TokenManifest.model_validate(combined.model_dump())
    write_bytes_whole(folder / MANIFEST_NAME, (checked.model_dump_json(indent=2) + "\n").encode())


def _refuse_used(out: Path, parts: Sequence[Tokens], overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not is_token_folder(out):
        raise UserError(f"{out} exists and is not a folder of tokens", "name another --out; this one is left alone")
    if any(part.where.resolve() == out.resolve() for part in parts):
        raise UserError(f"{out} is what is read", "name another --out")
    if not overwrite:
        raise UserError(f"{out} exists", "--overwrite replaces it, or name another --out")


def _refuse_unlike(first: Tokens, other: Tokens) -> None:
    """
    Raises:
        UserError: ids of the two folders do not mean the same, or their documents end otherwise.
    """
    hint = "tokenize both with one tokenizer"
    if (first.corpus is None) != (other.corpus is None):
        raise UserError(
            f"{first.where} and {other.where}: one is a folder of `mambatrain tokenize`, the other a bare pair",
            "merge folders of one kind",
        )
    files = first.tokenizer_file, other.tokenizer_file
    if files[0] is not None and files[1] is not None and not encode_alike(files[0], files[1]):
        raise UserError(f"{other.where} was tokenized with another tokenizer than {first.where}", hint)
    if first.train.dtype != other.train.dtype:
        shown = f"{other.train.dtype.name}, those of {first.where} {first.train.dtype.name}"
        raise UserError(f"the ids of {other.where} are {shown}", hint)
    if first.train.end_id != other.train.end_id:
        ends = " and ".join("none" if s.end_id is None else f"id {s.end_id}" for s in (first.train, other.train))
        raise UserError(f"the documents of {first.where} and {other.where} end in different tokens: {ends}", hint)
