"""A byte-level BPE tokenizer learned from text, which is split in a way that llama.cpp knows by name."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mambatrain.data.documents import DocumentReader
from mambatrain.data.manifest import (
    SourceRecord,
    TokenizerManifest,
    TokenizerSettings,
    differing_fields,
    differing_sources,
    read_manifest,
    record_sources,
    refuse_other_output,
)
from mambatrain.data.permutation import permute
from mambatrain.data.pretokenizers import PretokenizerName, cut_of, cut_text, make_pretokenizer
from mambatrain.data.progress import ByteProgress
from mambatrain.data.sources import Sources, check_unchanged, find_sources
from mambatrain.data.staging import only_writer_of
from mambatrain.data.streams import StandardInputKind, keep_streams
from mambatrain.data.text_fields import TextFields
from mambatrain.data.tokenizer import load_tokenizer
from mambatrain.errors import UserError
from mambatrain.files import sha256_of, write_bytes_whole, write_errors_named

END_OF_DOCUMENT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte and END_OF_DOCUMENT
HELD_OUT_FRACTION = 0.02  # of the sampled passages: on these the bytes per token are counted
PASSAGE_CHARACTERS = 65_536  # documents are drawn in passages of about this length, so that one long file is many


@dataclass(frozen=True)
class TrainedTokenizer:
    """What `train_tokenizer` made or found.

    Attributes:
        bad: the first of the documents that were left out, `origin reason`; none where `reused`.
    """

    file: Path
    manifest: TokenizerManifest
    reused: bool
    unread: tuple[Path, ...]
    bad: tuple[str, ...]


def train_tokenizer(
    sources: Sequence[str | Path],
    out: str | Path,
    settings: TokenizerSettings,
    overwrite: bool = False,
    standard_input: StandardInputKind = "jsonl",
    streaming: bool = False,
) -> TrainedTokenizer:
    """Trains a tokenizer into a `tokenizer.json`, or finds that this was done. `<|endoftext|>` has the id 0.

    The result depends on sources and settings alone. `OUT.manifest.json` beside it records them.

    Raises:
        UserError: anything wrong with sources, settings, output or disk.
    """
    file = Path(out)
    if settings.vocab_size < MIN_VOCAB_SIZE:
        message = f"--vocab-size {settings.vocab_size} is below {MIN_VOCAB_SIZE}"
        raise UserError(message, "every byte needs a token, and the end of a document another")
    if file.is_dir():
        raise UserError(f"{file} is a folder", f"name a file, for example --out {file / 'tokenizer.json'}")
    _check_special_tokens(settings)
    with tempfile.TemporaryDirectory(prefix="mambatrain-") as folder:
        fields = TextFields(settings.text_field, settings.template)
        found = find_sources(keep_streams(sources, Path(folder), fields, standard_input, streaming))
        records = record_sources(found.files)
        if file.exists() and not overwrite:
            manifest = _reusable(file, records, settings)
            return TrainedTokenizer(file, manifest, reused=True, unread=found.unread, bad=())
        with write_errors_named(file), only_writer_of(file):
            return _train_on(found, records, fields, file, settings)


def _train_on(
    found: Sources, records: list[SourceRecord], fields: TextFields, file: Path, settings: TokenizerSettings
) -> TrainedTokenizer:
    reader = DocumentReader(found.files, fields, settings.skip_bad)
    sample = _draw_sample(found, reader, settings)
    check_unchanged(found.files)
    num_held_out = max(1, int(len(sample) * HELD_OUT_FRACTION)) if len(sample) > 1 else 0
    training, held_out = sample[: len(sample) - num_held_out], sample[len(sample) - num_held_out :]
    content = _train(training, settings).to_str(pretty=True).encode()
    write_bytes_whole(file, content)
    manifest = TokenizerManifest(
        sources=records,
        settings=settings,
        sha256=hashlib.sha256(content).hexdigest(),
        vocab_size=load_tokenizer(file).vocab_size,
        num_sampled_bytes=sum(len(text.encode()) for text in training),
        num_skipped_bad=reader.num_bad,
        bytes_per_token=_bytes_per_token(file, held_out or training),
        held_out=bool(held_out),
    )
    write_bytes_whole(manifest_file(file), (manifest.model_dump_json(indent=2) + "\n").encode())
    return TrainedTokenizer(file, manifest, reused=False, unread=found.unread, bad=tuple(reader.bad))


def _check_special_tokens(settings: TokenizerSettings) -> None:
    named = [END_OF_DOCUMENT, *settings.special_tokens]
    for token in named:
        if not token or token.isspace() or named.count(token) > 1:
            why = "is named twice" if named.count(token) > 1 else "is nothing but white space"
            raise UserError(f"--special-token {token!r} {why}", f"{END_OF_DOCUMENT} is always there; name others once")
    if settings.vocab_size < MIN_VOCAB_SIZE + len(settings.special_tokens):
        message = f"--vocab-size {settings.vocab_size} has no room for {len(settings.special_tokens)} special tokens"
        raise UserError(message, "every byte needs a token, too")


def manifest_file(tokenizer_file: Path) -> Path:
    """The record beside a trained tokenizer."""
    return tokenizer_file.with_name(tokenizer_file.name + ".manifest.json")


def _reusable(file: Path, records: list[SourceRecord], settings: TokenizerSettings) -> TokenizerManifest:
    """The record of the tokenizer that is there, if it is what would be made."""
    hint = "--overwrite replaces it, or name another --out"
    if not manifest_file(file).is_file():
        raise UserError(f"{file} exists and has no record of how it was made ({manifest_file(file).name})", hint)
    manifest = read_manifest(manifest_file(file), TokenizerManifest)
    if sha256_of(file) != manifest.sha256:
        raise UserError(f"{file} was changed since it was trained", hint)
    differences = differing_fields(manifest.settings, settings) + differing_sources(manifest.sources, records)
    if differences:
        raise refuse_other_output(file, differences)
    return manifest


def _draw_sample(sources: Sources, reader: DocumentReader, settings: TokenizerSettings) -> list[str]:
    """Passages drawn uniformly over the whole corpus, in random order: those with the smallest random keys."""
    kept: list[tuple[int, str]] = []  # a heap by negative key: the passage to give up next comes first
    num_bytes = 0
    with ByteProgress("reading", sources.num_bytes) as progress:
        for key, passage in zip(_random_keys(), _passages(reader, settings.pretokenizer), strict=False):
            heapq.heappush(kept, (-key, passage))
            num_bytes += len(passage.encode())
            while num_bytes > settings.sample_bytes and len(kept) > 1:
                num_bytes -= len(heapq.heappop(kept)[1].encode())
            progress.advance_to(reader.bytes_read)
    if not kept:
        hint = f"the first that cannot be read: {reader.bad[0]}" if reader.bad else "name files that hold text"
        raise UserError(f"the sources hold no text (files: {len(sources.files)})", hint)
    return [passage for _, passage in sorted(kept, reverse=True)]


def _random_keys() -> Iterator[int]:
    """Distinct numbers without end, the same every time; made many at once, which NumPy does fast."""
    for first in itertools.count(step=4096):
        yield from permute(np.arange(first, first + 4096, dtype=np.int64), 2**62, 0).tolist()


def _passages(reader: DocumentReader, pretokenizer: PretokenizerName) -> Iterator[str]:
    for document in reader:
        if document.text and not document.text.isspace():
            yield from cut_text(document.text, PASSAGE_CHARACTERS, cut_of(pretokenizer))


def _train(texts: Sequence[str], settings: TokenizerSettings) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = make_pretokenizer(settings.pretokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[END_OF_DOCUMENT, *settings.special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def _bytes_per_token(file: Path, texts: Sequence[str]) -> float:
    num_tokens = sum(len(ids) for ids in load_tokenizer(file).encode_batch(texts))
    return sum(len(text.encode()) for text in texts) / num_tokens
