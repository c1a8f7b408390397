"""Text into token shards: encoded in the order of the sources, then written once more in a shuffled order."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambatrain.data.documents import Document, DocumentReader
from mambatrain.data.manifest import (
    FileRecord,
    ShardRecord,
    SourceRecord,
    TokenizeOptions,
    TokenizerRecord,
    TokenManifest,
    differing_fields,
    differing_sources,
    record_sources,
    refuse_other_output,
)
from mambatrain.data.permutation import permute
from mambatrain.data.progress import ByteProgress
from mambatrain.data.sources import Sources, check_unchanged, find_sources
from mambatrain.data.staging import StagedFolder
from mambatrain.data.token_corpus import (
    DATA_FILES,
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_NAME,
    TokenCorpus,
    is_token_folder,
    open_token_corpus,
)
from mambatrain.data.token_shards import TokenShard, TokenShardWriter, shard_files, token_dtype
from mambatrain.data.tokenizer import LoadedTokenizer, load_tokenizer
from mambatrain.errors import UserError
from mambatrain.files import fsync_file, sha256_of, write_bytes_whole, write_errors_named

BATCH_CHARACTERS = 4_000_000  # text that is read before it is encoded; enough for all cores, little to hold
_STAGING_NAME = "in_source_order"


@dataclass(frozen=True)
class Tokenized:
    """What `tokenize_corpus` made or found.

    Attributes:
        corpus: the open folder.
        reused: it was there already, made from the same.
        unread: files in the sources' folders whose ending is not read.
        bad: the first of the documents that were left out, `origin reason`; none where `reused`.
    """

    corpus: TokenCorpus
    reused: bool
    unread: tuple[Path, ...]
    bad: tuple[str, ...]


@dataclass(frozen=True)
class _Encoded:
    """The documents of a corpus in source order, one shard. Lengths count UTF-8 bytes of text: (num_documents,)."""

    shard: TokenShard
    text_bytes: NDArray[np.int64]
    num_skipped_empty: int
    reader: DocumentReader


def tokenize_corpus(
    sources: Sequence[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    options: TokenizeOptions,
    end_of_document: str | None = None,
    overwrite: bool = False,
    batch_characters: int = BATCH_CHARACTERS,
) -> Tokenized:
    """Tokenizes files and folders of text into a folder of shards, or finds that this was done.

    The result depends on sources, tokenizer and options alone. The folder appears whole; on the way it takes twice
    the tokens' room on the disk.

    Args:
        end_of_document: name of the token behind every document; None: found by its usual names.
        overwrite: replace a folder of tokens that was made from something else.
        batch_characters: text that is encoded at once.

    Raises:
        UserError: anything wrong with sources, tokenizer, output or disk; nothing is left behind.
    """
    found = find_sources(sources)
    loaded = load_tokenizer(tokenizer, end_of_document)
    with write_errors_named(out), StagedFolder(out) as staged:
        records = record_sources(found.files)
        if Path(out).exists() and not _is_empty_folder(Path(out)):
            existing = _reusable(Path(out), records, loaded, options, overwrite)
            if existing is not None:
                return Tokenized(existing, reused=True, unread=found.unread, bad=())
        encoded = _encode(found, loaded, options, staged.path / _STAGING_NAME, batch_characters)
        check_unchanged(found.files)
        train, held_out = _write_shuffled(encoded, loaded, options, staged.path)
        for file in shard_files(staged.path / _STAGING_NAME):
            file.unlink()
        write_bytes_whole(staged.path / TOKENIZER_NAME, loaded.file.read_bytes())
        manifest = TokenManifest(
            tokenizer=_record_tokenizer(loaded),
            sources=records,
            options=options,
            dtype="uint16" if encoded.shard.dtype.name == "uint16" else "int32",
            train=train,
            held_out=held_out,
            num_skipped_empty=encoded.num_skipped_empty,
            num_skipped_bad=encoded.reader.num_bad,
            files={name: _record_file(staged.path / name) for name in DATA_FILES},
        )
        write_bytes_whole(staged.path / MANIFEST_NAME, (manifest.model_dump_json(indent=2) + "\n").encode())
        open_token_corpus(staged.path)  # what cannot be read back is not put in place
        staged.publish()
    return Tokenized(open_token_corpus(out), reused=False, unread=found.unread, bad=tuple(encoded.reader.bad))


def num_held_out(num_documents: int, fraction: float) -> int:
    """ceil(fraction * num_documents), exact in the decimal fraction; one document at least stays to train on."""
    return min(math.ceil(Fraction(str(fraction)) * num_documents), max(num_documents - 1, 0))


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _reusable(
    out: Path, records: list[SourceRecord], loaded: LoadedTokenizer, options: TokenizeOptions, overwrite: bool
) -> TokenCorpus | None:
    """The folder that is there, if it is what would be made; None if it may be replaced."""
    if not out.is_dir() or not is_token_folder(out):
        raise UserError(f"{out} exists and is not a folder of tokens", "name another --out; this one is left alone")
    if overwrite:
        return None
    try:
        corpus = open_token_corpus(out)
    except UserError as error:
        raise UserError(error.message, "--overwrite makes the folder anew") from error
    before, now = corpus.manifest.tokenizer, _record_tokenizer(loaded)
    differences = [f"tokenizer {line}" for line in differing_fields(before.model_copy(update={"file": now.file}), now)]
    differences += differing_fields(corpus.manifest.options, options)
    differences += differing_sources(corpus.manifest.sources, records)
    if differences:
        raise refuse_other_output(out, differences)
    return corpus


def _encode(
    sources: Sources, loaded: LoadedTokenizer, options: TokenizeOptions, prefix: Path, batch_characters: int
) -> _Encoded:
    reader = DocumentReader(sources.files, options.text_field, options.skip_bad)
    text_bytes = array("q")
    num_skipped_empty = 0
    end = np.array([loaded.end_of_document_id], dtype=np.int32)
    with (
        TokenShardWriter(prefix, token_dtype(loaded.vocab_size)) as writer,
        ByteProgress("tokenizing", sources.num_bytes) as progress,
    ):
        for batch in _batches(reader, batch_characters):
            for document, ids in zip(batch, loaded.encode_batch([document.text for document in batch]), strict=True):
                if not len(ids) or document.text.isspace():
                    num_skipped_empty += 1
                    continue
                _check_ids(ids, loaded, document)
                writer.append(np.concatenate([ids, end]))
                text_bytes.append(len(document.text) if document.text.isascii() else len(document.text.encode()))
            progress.advance_to(reader.bytes_read)
    if not text_bytes:
        raise _empty_corpus(sources, reader, num_skipped_empty)
    lengths = np.frombuffer(text_bytes, dtype=np.int64)
    return _Encoded(TokenShard(prefix), lengths, num_skipped_empty, reader)


def _batches(reader: DocumentReader, batch_characters: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in reader:
        batch.append(document)
        characters += len(document.text)
        if characters >= batch_characters:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_ids(ids: NDArray[np.int32], loaded: LoadedTokenizer, document: Document) -> None:
    """An end token within a document would be taken for its end."""
    if (ids == loaded.end_of_document_id).any():
        raise UserError(
            f"{document.origin} holds {loaded.end_of_document} as text, and the tokenizer takes it for the token",
            f'mark the token as `"special": true` in {loaded.file}, or name another with --end-of-document',
        )


def _empty_corpus(sources: Sources, reader: DocumentReader, num_skipped_empty: int) -> UserError:
    counts = f"files: {len(sources.files)}, empty documents: {num_skipped_empty}, unreadable ones: {reader.num_bad}"
    hint = f"the first: {reader.bad[0]}" if reader.bad else "name files that hold text"
    return UserError(f"the sources hold no text ({counts})", hint)


def _write_shuffled(
    encoded: _Encoded, loaded: LoadedTokenizer, options: TokenizeOptions, folder: Path
) -> tuple[ShardRecord, ShardRecord]:
    """The two shards and their bytes: the shuffled order's last documents are held out."""
    num_documents = encoded.shard.num_documents
    order = permute(np.arange(num_documents, dtype=np.int64), num_documents, options.seed)
    cut = num_documents - num_held_out(num_documents, options.held_out)
    total_bytes = encoded.shard.num_tokens * encoded.shard.dtype.itemsize
    records: list[ShardRecord] = []
    with ByteProgress("shuffling documents", total_bytes) as progress:
        done = 0
        for split, indices in zip(SPLITS, (order[:cut], order[cut:]), strict=True):
            with TokenShardWriter(folder / split, encoded.shard.dtype) as writer:
                writer.append(np.array([loaded.end_of_document_id]))
                for index in indices:
                    start = int(encoded.shard.document_starts[index])
                    writer.append(encoded.shard.tokens(start, start + int(encoded.shard.document_lengths[index])))
                    progress.advance_to(done + writer.num_tokens * encoded.shard.dtype.itemsize)
            done += writer.num_tokens * encoded.shard.dtype.itemsize
            text_bytes = np.concatenate([[0], encoded.text_bytes[indices]]).astype("<i8")
            _write_array(folder / f"{split}.bytes.npy", text_bytes)
            num_bytes = int(text_bytes.sum())
            records.append(ShardRecord(num_documents=len(indices), num_tokens=writer.num_tokens, num_bytes=num_bytes))
    return records[0], records[1]


def _write_array(path: Path, values: NDArray[np.int64]) -> None:
    np.save(path, values, allow_pickle=False)
    fsync_file(path)


def _record_tokenizer(loaded: LoadedTokenizer) -> TokenizerRecord:
    return TokenizerRecord(
        file=str(loaded.file),
        sha256=loaded.sha256,
        vocab_size=loaded.vocab_size,
        end_of_document=loaded.end_of_document,
        end_of_document_id=loaded.end_of_document_id,
    )


def _record_file(path: Path) -> FileRecord:
    return FileRecord(num_bytes=path.stat().st_size, sha256=sha256_of(path))
