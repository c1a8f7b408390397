"""Conversations into a folder of tokens: shards as text has them, and beside each which of its tokens count.

A document is the tokens that the template gives for a conversation, and nothing else: what training reads is what
`chat`, and transformers with the exported template, read later. Its boundary is its first token.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from mambatrain.chats.encode import EncodedChat
from mambatrain.chats.read_chats import Outcome, Together, fields_of, read_chats
from mambatrain.chats.template import ChatTemplate
from mambatrain.data.chats_record import ChatsRecord
from mambatrain.data.documents import DocumentReader
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
)
from mambatrain.data.permutation import permute
from mambatrain.data.shuffle_documents import num_held_out
from mambatrain.data.sources import check_unchanged, find_sources
from mambatrain.data.staging import StagedFolder
from mambatrain.data.streams import keep_streams
from mambatrain.data.token_corpus import (
    CHAT_FILES,
    MANIFEST_NAME,
    TEMPLATE_NAME,
    TOKENIZER_NAME,
    TokenCorpus,
    is_token_folder,
    open_token_corpus,
)
from mambatrain.data.token_shards import TokenShardWriter, token_dtype
from mambatrain.data.tokenizer import LoadedTokenizer
from mambatrain.errors import UserError
from mambatrain.files import fsync_file, sha256_of, write_bytes_whole, write_errors_named, write_json_whole
from mambatrain.recipe.chat_section import PAIRS, ChatSection


def tokenize_chats(
    section: ChatSection, loaded: LoadedTokenizer, template: ChatTemplate, row_tokens: int, out: Path
) -> TokenCorpus:
    """Tokenizes the conversations of a recipe into a folder, or finds that this was done.

    All of them are in memory meanwhile, at 5 bytes a token.

    Args:
        section: which ones, and what counts.
        loaded: the tokenizer, new tokens included.
        template: how messages become text.
        row_tokens: what a conversation has to fit into.
        out: the folder; one of conversations that were other ones is replaced.

    Raises:
        UserError: a conversation cannot be used and is not to be left out, by file and line; or `out` is in use.
    """
    with write_errors_named(out), StagedFolder(out) as staged:
        fields = fields_of(section)
        files = find_sources(keep_streams(section.files, staged.path, fields)).files
        for file in files:
            if file.kind in ("text", "python"):
                raise UserError(f"{file.name} holds text, not conversations", "name .jsonl, .json, .parquet or .arrow")
        records = record_sources(files)
        if (found := _reusable(out, section, records, loaded, template, row_tokens)) is not None:
            return found
        what = "pair" if section.format == PAIRS else "conversation"
        skip = f"data.chats.skip_bad=true leaves such {what}s out and counts them"
        reader = DocumentReader(files, fields, section.skip_bad, how_to_skip=skip)
        outcome = Outcome()
        chats = read_chats(reader, files, section, loaded, template, row_tokens, outcome)
        check_unchanged(files)
        if not chats:
            told = f"the first: {reader.bad[0]}" if reader.bad else "name files that hold some"
            raise UserError(f"{', '.join(section.files)} hold no {what} that can be used", told)
        _write_folder(staged.path, chats, section, records, loaded, template, row_tokens, outcome, reader)
        staged.publish()
    return open_token_corpus(out)


def _write_folder(
    folder: Path,
    chats: list[Together],
    section: ChatSection,
    records: list[SourceRecord],
    loaded: LoadedTokenizer,
    template: ChatTemplate,
    row_tokens: int,
    outcome: Outcome,
    reader: DocumentReader,
) -> None:
    order = permute(np.arange(len(chats), dtype=np.int64), len(chats), section.seed).tolist()
    num_kept = len(chats) - (num_held_out(len(chats), section.held_out) if len(chats) > 1 else 0)
    chosen = {"train": order[:num_kept], "held_out": order[num_kept:]}
    parts = {split: [chat for number in numbers for chat in chats[number]] for split, numbers in chosen.items()}
    shards = {split: _write_split(folder, split, part, loaded) for split, part in parts.items()}
    write_bytes_whole(folder / TOKENIZER_NAME, loaded.content)
    write_bytes_whole(folder / TEMPLATE_NAME, template.source.encode())
    write_json_whole(
        folder / "tokenizer_config.json", {"bos_token": template.bos_token, "eos_token": template.eos_token}
    )
    manifest = TokenManifest(
        tokenizer=_record_tokenizer(loaded),
        sources=records,
        options=TokenizeOptions(held_out=section.held_out, seed=section.seed, skip_bad=section.skip_bad),
        dtype="uint16" if token_dtype(loaded.vocab_size).name == "uint16" else "int32",
        end_of_document_policy="none",
        train=shards["train"],
        held_out=shards["held_out"],
        num_skipped_empty=0,
        num_skipped_bad=reader.num_bad,
        files={
            name: FileRecord(num_bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
            for name in CHAT_FILES
        },
        chats=ChatsRecord(
            options=section,
            row_tokens=row_tokens,
            template=template.name,
            template_sha256=_sha256_of(template),
            formats=dict(outcome.formats),
            num_counted={split: sum(int(chat.counted.sum()) for chat in part) for split, part in parts.items()},
            num_truncated=outcome.num_truncated,
            num_counted_cut=outcome.num_counted_cut,
            num_too_long=outcome.num_too_long,
            first_too_long=outcome.first_too_long,
            bad=reader.bad,
        ),
    )
    write_bytes_whole(folder / MANIFEST_NAME, (manifest.model_dump_json(indent=2) + "\n").encode())
    open_token_corpus(folder)  # what cannot be read back is not put in place


def _write_split(folder: Path, split: str, chats: list[EncodedChat], loaded: LoadedTokenizer) -> ShardRecord:
    with TokenShardWriter(folder / split, token_dtype(loaded.vocab_size)) as writer:
        for chat in chats:
            writer.append(chat.ids)
    num_bytes = np.array([chat.num_counted_bytes for chat in chats], dtype=np.int64)
    counted = np.concatenate([np.empty(0, dtype=np.bool_), *(chat.counted for chat in chats)])
    for file, values in ((f"{split}.bytes.npy", num_bytes), (f"{split}.counted.npy", counted)):
        np.save(folder / file, values, allow_pickle=False)
        fsync_file(folder / file)
    return ShardRecord(num_documents=len(chats), num_tokens=writer.num_tokens, num_bytes=int(num_bytes.sum()))


def _reusable(
    out: Path,
    section: ChatSection,
    records: list[SourceRecord],
    loaded: LoadedTokenizer,
    template: ChatTemplate,
    row_tokens: int,
) -> TokenCorpus | None:
    """The folder that is there, if it is what would be made; None: it is made anew."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir() or not is_token_folder(out):
        raise UserError(f"{out} exists and is not a folder of conversations", "name another place, or remove it")
    try:
        corpus = open_token_corpus(out)
    except UserError:  # damaged, or of another version: it may always be made again
        return None
    record = corpus.manifest.chats
    same = (
        record is not None
        and not differing_fields(record.options, section.model_copy(update={"files": record.options.files}))
        and (record.row_tokens, record.template_sha256) == (row_tokens, _sha256_of(template))
        and not differing_sources(corpus.manifest.sources, records)
        and corpus.manifest.tokenizer.sha256 == loaded.sha256
    )
    return corpus if same else None


def _record_tokenizer(loaded: LoadedTokenizer) -> TokenizerRecord:
    return TokenizerRecord(
        file=str(loaded.file),
        sha256=loaded.sha256,
        vocab_size=loaded.vocab_size,
        end_of_document=loaded.end_of_document,
        end_of_document_id=loaded.end_of_document_id,
    )


def _sha256_of(template: ChatTemplate) -> str:
    spelled = json.dumps([template.source, template.bos_token, template.eos_token])
    return hashlib.sha256(spelled.encode()).hexdigest()
