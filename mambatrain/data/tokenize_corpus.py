"""Text into token shards: encoded in the order of the sources, then written once more in a shuffled order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambatrain.data.cleaning import Cleaner, normalizer_changes, word_runs_of
from mambatrain.data.documents import MAX_BAD_NAMED, DocumentReader
from mambatrain.data.encode_documents import BATCH_CHARACTERS, encode_documents, num_usable_cores
from mambatrain.data.manifest import (
    FileRecord,
    SourceRecord,
    TokenizeOptions,
    TokenizerRecord,
    TokenManifest,
    differing_fields,
    differing_sources,
    record_sources,
    refuse_other_output,
)
from mambatrain.data.near_duplicates import check_datasketch
from mambatrain.data.progress import ByteProgress
from mambatrain.data.shuffle_documents import find_duplicates, write_shuffled
from mambatrain.data.sources import SourceFile, Sources, check_unchanged, find_sources
from mambatrain.data.staging import StagedFolder
from mambatrain.data.streams import StandardInputKind, keep_streams
from mambatrain.data.text_fields import TextFields
from mambatrain.data.token_corpus import (
    DATA_FILES,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    TokenCorpus,
    is_token_folder,
    open_token_corpus,
)
from mambatrain.data.token_shards import token_dtype
from mambatrain.data.token_spool import Progress, TokenSpool, identity_of
from mambatrain.data.tokenizer import LoadedTokenizer, load_tokenizer
from mambatrain.errors import UserError
from mambatrain.files import sha256_of, write_bytes_whole, write_errors_named

_SPOOL_VERSION = 1  # of what a spool's bytes mean: one of another version is not continued


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
class HowToRead:
    """What does not change the tokens, and how streams become files.

    Attributes:
        num_workers: threads that encode; None: one a core.
        standard_input: what `-` holds.
        streaming: data sets of the hub are read row by row, not downloaded whole.
        batch_characters: text that a thread encodes at once.
    """

    num_workers: int | None = None
    standard_input: StandardInputKind = "jsonl"
    streaming: bool = False
    batch_characters: int = BATCH_CHARACTERS


def tokenize_corpus(
    sources: Sequence[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    options: TokenizeOptions,
    end_of_document: str | None = None,
    overwrite: bool = False,
    how: HowToRead = HowToRead(),
    decontaminate: Sequence[str | Path] = (),
) -> Tokenized:
    """Tokenizes files and folders of text into a folder of shards, or finds that this was done.

    The result depends on sources, tokenizer and options alone. The folder appears whole; on the way it takes twice
    the tokens' room on the disk. A call that was stopped is continued by the next with the same arguments, from
    `.NAME.work` beside the folder.

    Args:
        end_of_document: name of the token behind every document; None: found by its usual names.
        overwrite: replace a folder of tokens that was made from something else.
        decontaminate: evaluation files; their records go into `options.cleaning.decontaminate`.

    Raises:
        UserError: anything wrong with sources, tokenizer, output or disk; nothing is left behind.
    """
    fields = TextFields(options.text_field, options.template)
    if options.cleaning.near_duplicates is not None:
        check_datasketch()
    loaded = load_tokenizer(tokenizer, end_of_document)
    with write_errors_named(out), StagedFolder(out) as staged:
        staged.work.mkdir(exist_ok=True)
        found = find_sources(keep_streams(sources, staged.work, fields, how.standard_input, how.streaming))
        records = record_sources(found.files)
        evaluation = find_sources(decontaminate).files if decontaminate else ()
        cleaning = options.cleaning.model_copy(update={"decontaminate": record_sources(evaluation)})
        options = options.model_copy(update={"cleaning": cleaning})
        if Path(out).exists() and not _is_empty_folder(Path(out)):
            existing = _reusable(Path(out), records, loaded, options, overwrite)
            if existing is not None:
                return Tokenized(existing, reused=True, unread=found.unread, bad=())
        spool = _open_spool(staged.work, records, loaded, options)
        _encode(spool, found, loaded, options, how, evaluation)
        check_unchanged([*found.files, *evaluation])
        _write_folder(spool, records, loaded, options, staged.path)
        staged.publish()
        bad = tuple(spool.journal.progress.bad)
    return Tokenized(open_token_corpus(out), reused=False, unread=found.unread, bad=bad)


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
    combined = corpus.manifest.combined
    if combined is not None:  # its sources and options are those of its parts, its documents lie otherwise
        parts = ", ".join(part.folder for part in combined.parts)
        raise refuse_other_output(out, [f"by `data {combined.verb}`, from {parts}"])
    if corpus.manifest.chats is not None:
        raise refuse_other_output(out, ["from conversations"])
    before, now = corpus.manifest.tokenizer, _record_tokenizer(loaded)
    differences = [f"tokenizer {line}" for line in differing_fields(before.model_copy(update={"file": now.file}), now)]
    differences += differing_fields(corpus.manifest.options, options)
    differences += differing_sources(corpus.manifest.sources, records)
    if differences:
        raise refuse_other_output(out, differences)
    return corpus


def _open_spool(
    folder: Path, records: list[SourceRecord], loaded: LoadedTokenizer, options: TokenizeOptions
) -> TokenSpool:
    named = [*records, *options.cleaning.decontaminate]
    identity = identity_of(
        {
            "version": _SPOOL_VERSION,
            "sources": [(record.kind, record.num_bytes, record.sha256) for record in named],
            "options": options.model_dump(exclude={"cleaning": {"decontaminate"}}),
            "tokenizer": (loaded.sha256, loaded.end_of_document_id),
        }
    )
    cleaning = options.cleaning
    wanted = {"digests": cleaning.deduplicate, "signatures": cleaning.near_duplicates is not None}
    kept = tuple(name for name, is_wanted in wanted.items() if is_wanted)
    return TokenSpool(folder, identity, token_dtype(loaded.vocab_size), kept)


def _encode(
    spool: TokenSpool,
    sources: Sources,
    loaded: LoadedTokenizer,
    options: TokenizeOptions,
    how: HowToRead,
    evaluation: Sequence[SourceFile],
) -> None:
    """Fills the spool, from where it stands."""
    if spool.journal.complete:
        return
    before = spool.journal.progress
    if spool.continued:
        sys.stderr.write(f"continuing: {spool.journal.num_documents:,} documents were tokenized before\n")
    fields = TextFields(options.text_field, options.template)
    reader = DocumentReader(sources.files, fields, options.skip_bad, start=before.place)
    reader.bad.extend(before.bad)
    cleaner = Cleaner(options.cleaning, normalizer_changes(loaded.tokenizer), word_runs_of(evaluation))
    cleaner.counts.update(before.counts)
    num_bad_before = before.counts.get("num_skipped_bad", 0)

    def progress_now() -> Progress:
        counts = {**cleaner.counts, "num_skipped_bad": num_bad_before + reader.num_bad}
        return Progress(
            num_files=reader.place.num_files,
            num_units=reader.place.num_units,
            bytes_read=reader.bytes_read,
            counts=counts,
            bad=reader.bad[:MAX_BAD_NAMED],
        )

    batches = encode_documents(
        cleaner.clean(reader),
        loaded,
        spool.dtype,
        progress_now,
        how.num_workers or num_usable_cores(),
        how.batch_characters,
    )
    with spool, ByteProgress("tokenizing", sources.num_bytes, before.bytes_read) as progress:
        for batch in batches:
            spool.add(batch)
            progress.advance_to(spool.journal.progress.bytes_read)
        if not spool.journal.num_documents:
            raise _empty_corpus(sources, spool)
        spool.complete()


def _empty_corpus(sources: Sources, spool: TokenSpool) -> UserError:
    progress = spool.journal.progress
    counts = dict(progress.counts)
    num_bad = counts.pop("num_skipped_bad", 0)
    num_empty = counts.pop("num_skipped_empty", 0) + spool.journal.num_left_empty
    told = f"files: {len(sources.files)}, empty documents: {num_empty}, unreadable ones: {num_bad}"
    left_out = {
        name: count for name, count in counts.items() if name in ("num_too_short", "num_too_long", "num_contaminated")
    }
    told += "".join(f", {name.removeprefix('num_').replace('_', ' ')}: {count}" for name, count in left_out.items())
    hint = f"the first: {progress.bad[0]}" if progress.bad else "name files that hold text"
    return UserError(f"the sources hold no text ({told})", hint)


def _write_folder(
    spool: TokenSpool, records: list[SourceRecord], loaded: LoadedTokenizer, options: TokenizeOptions, folder: Path
) -> None:
    duplicates = find_duplicates(spool, options.cleaning)
    train, held_out = write_shuffled(spool, duplicates.kept, loaded.end_of_document_id, options, folder)
    write_bytes_whole(folder / TOKENIZER_NAME, loaded.content)
    counts: dict[str, Any] = dict(spool.journal.progress.counts)
    counts["num_skipped_empty"] = counts.get("num_skipped_empty", 0) + spool.journal.num_left_empty
    manifest = TokenManifest(
        tokenizer=_record_tokenizer(loaded),
        sources=records,
        options=options,
        dtype="uint16" if spool.dtype.name == "uint16" else "int32",
        train=train,
        held_out=held_out,
        num_duplicates=duplicates.num_exact,
        num_near_duplicates=duplicates.num_near,
        files={name: _record_file(folder / name) for name in DATA_FILES},
        **counts,
    )
    write_bytes_whole(folder / MANIFEST_NAME, (manifest.model_dump_json(indent=2) + "\n").encode())
    open_token_corpus(folder)  # what cannot be read back is not put in place


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
