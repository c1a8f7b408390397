"""What was made from what: the records that stand beside tokens and tokenizers, and how two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from mambatrain.data.chats_record import ChatsRecord
from mambatrain.data.pretokenizers import PretokenizerName
from mambatrain.data.progress import ByteProgress
from mambatrain.data.sources import SourceFile
from mambatrain.errors import UserError
from mambatrain.files import sha256_of
from mambatrain.recipe.sections import Section

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SourceRecord(Section):
    """A file of text that was read."""

    file: str
    """As the user named it, or below a folder so named."""
    kind: str
    """How it was read: `json lines`, `gzipped json lines`, `parquet`."""
    num_bytes: Count
    """On disk."""
    sha256: Sha256


class FileRecord(Section):
    """A file that was written."""

    num_bytes: Count
    sha256: Sha256


class TokenizerRecord(Section):
    """The tokenizer that made the tokens."""

    file: str
    """As the user named it; a copy lies beside the tokens."""
    sha256: Sha256
    vocab_size: Count
    """Highest id + 1."""
    end_of_document: str
    end_of_document_id: Count


class CleaningOptions(Section):
    """What is done to documents before they are tokenized, and which are left out; nothing by default."""

    normalize: Literal["NFC", "NFKC"] | None = None
    """Unicode normalization form."""
    min_characters: Count = 0
    max_characters: Annotated[int, Field(ge=1)] | None = None
    """Documents with fewer or more characters are left out."""
    deduplicate: bool = False
    """Of documents with the same text the first is kept."""
    near_duplicates: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Documents whose sets of word 5-grams are this similar (Jaccard, as MinHash estimates it) to one before."""
    decontaminate: list[SourceRecord] = Field(default_factory=list)
    """Documents that share 13 words in a row with one of these files are left out."""


class TokenizeOptions(Section):
    """What decides the tokens beside sources and tokenizer."""

    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """Fraction of the documents that is held out."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Of the order of documents."""
    text_field: str = "text"
    """Field of JSON objects, column of parquet files."""
    template: str | None = None
    """Several fields in one text, `{title}\\n\\n{body}`; None: the text field alone."""
    skip_bad: bool = False
    """Leave out what cannot be read."""
    cleaning: CleaningOptions = CleaningOptions()


class ShardRecord(Section):
    """One shard in numbers."""

    num_documents: Count
    """Of text: without the end token that opens the shard."""
    num_tokens: Count
    """All of them, with the opening and every other end token."""
    num_bytes: Count
    """UTF-8 bytes of the documents' text."""


class CombinedFrom(Section):
    """A folder that documents were taken from."""

    folder: str
    """As the user named it."""
    digest: Sha256
    """Of its shards."""


class Combination(Section):
    """How a folder was made from others."""

    verb: Literal["merge", "split"]
    seed: int
    held_out: float | None
    """`split` only: the fraction held out."""
    parts: list[CombinedFrom]


class TokenManifest(Section):
    """`manifest.json` of a folder of tokens."""

    format: Literal["mambatrain tokens"] = "mambatrain tokens"
    version: Literal[1] = 1
    tokenizer: TokenizerRecord
    sources: list[SourceRecord]
    options: TokenizeOptions
    dtype: Literal["uint16", "int32"]
    """Of the ids on disk."""
    end_of_document_policy: Literal["appended", "none"] = "appended"
    """appended: every document is followed by its end token, and one more opens each shard. none: a document is its
    tokens alone, as conversations are."""
    train: ShardRecord
    held_out: ShardRecord
    num_skipped_empty: Count
    """Documents of nothing but white space, or of which the tokenizer leaves nothing."""
    num_skipped_bad: Count
    """Documents that could not be read."""
    num_changed_by_tokenizer: Count = 0
    """Documents that the tokenizer's own normalizer changes, so that decoding gives not quite their text."""
    num_with_nul: Count = 0
    """Documents with NUL characters, which are kept."""
    num_with_crlf: Count = 0
    """Documents with line ends of two characters, which are kept."""
    num_normalized: Count = 0
    """Documents that `options.cleaning.normalize` changed."""
    num_too_short: Count = 0
    num_too_long: Count = 0
    num_duplicates: Count = 0
    num_near_duplicates: Count = 0
    num_contaminated: Count = 0
    """Documents that were left out, by the options of `options.cleaning`; each counts once, by the first in this order
    but for duplicates, which are looked for last."""
    files: dict[str, FileRecord]
    """Every other file of the folder."""
    chats: ChatsRecord | None = None
    """How conversations became the tokens; None: they are of text."""
    combined: Combination | None = None
    """Where `data merge` or `data split` made the folder: of what; `options` are those of the first part then."""


class TokenizerSettings(Section):
    """What decides a trained tokenizer beside its sources."""

    vocab_size: Annotated[int, Field(ge=1)]
    sample_bytes: Annotated[int, Field(ge=1)]
    """UTF-8 bytes of text that were drawn, at most."""
    pretokenizer: PretokenizerName = "gpt-2"
    """How text is split before anything is merged; llama.cpp's names."""
    special_tokens: list[str] = Field(default_factory=list)
    """Behind the end of a document, whose id is 0: ids 1, 2, ..."""
    text_field: str = "text"
    template: str | None = None
    skip_bad: bool = False


class TokenizerManifest(Section):
    """`FILE.manifest.json` beside a trained tokenizer."""

    format: Literal["mambatrain tokenizer"] = "mambatrain tokenizer"
    version: Literal[1] = 1
    sources: list[SourceRecord]
    settings: TokenizerSettings
    sha256: Sha256
    """Of the tokenizer."""
    vocab_size: Count
    """Tokens it has; fewer than asked for where the text gave no more."""
    num_sampled_bytes: Count
    """Text it was trained on."""
    num_skipped_bad: Count
    bytes_per_token: float
    """On text it was not trained on, if `held_out` says so."""
    held_out: bool


Manifest = TypeVar("Manifest", bound=Section)


def record_sources(files: Sequence[SourceFile]) -> list[SourceRecord]:
    """Size and digest of every source, with progress."""
    records, done = [], 0
    with ByteProgress("checking sources", sum(file.num_bytes for file in files)) as progress:
        for file in files:
            try:
                digest = sha256_of(file.path)
            except OSError as error:
                raise UserError(
                    f"{file.name} cannot be read: {error.strerror}", "it must be there to the end, and yours to read"
                ) from error
            records.append(_record_source(file, digest))
            done += file.num_bytes
            progress.advance_to(done)
    return records


def _record_source(file: SourceFile, digest: str) -> SourceRecord:
    return SourceRecord(file=file.name, kind=file.kind_name, num_bytes=file.num_bytes, sha256=digest)


def read_manifest(path: Path, kind: type[Manifest]) -> Manifest:
    """Reads and checks a manifest.

    Raises:
        UserError: it is missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist", "it is written last: without it what it describes is not complete")
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        reason = ": ".join([*map(str, problem["loc"]), problem["msg"]])
        hint = "it was damaged, or written by another version of mambatrain; --overwrite makes the output anew"
        raise UserError(f"{path} is not a manifest that can be read: {reason}", hint) from None


def differing_sources(before: Sequence[SourceRecord], after: Sequence[SourceRecord]) -> list[str]:
    """What differs between two lists of sources, one line each; empty where both hold the same bytes in one order."""
    if [_content(record) for record in before] == [_content(record) for record in after]:
        return []  # names may differ: a folder may be named in several ways
    old, new = ({record.file: record for record in records} for records in (before, after))
    lines = [f"sources: {name} is no longer among them" for name in old if name not in new]
    lines += [f"sources: {name} was not among them" for name in new if name not in old]
    both = [name for name in new if name in old and _content(new[name]) != _content(old[name])]
    lines += [
        f"sources: {name} has changed ({old[name].num_bytes:,} -> {new[name].num_bytes:,} bytes)" for name in both
    ]
    return lines or ["sources: their order is another"]


def differing_fields(before: Section, after: Section) -> list[str]:
    """`name: value -> value` for every field in which two sections of one kind differ."""
    lines = []
    for name in type(after).model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(new, Section) and isinstance(old, Section):
            lines += differing_fields(old, new)
        elif name == "decontaminate":
            lines += [f"decontaminate {line}" for line in differing_sources(old, new)]
        elif old != new:
            lines.append(f"{name}: {_shown(old)} -> {_shown(new)}")
    return lines


def refuse_other_output(out: str | Path, differences: Sequence[str]) -> UserError:
    """The error for an output that was made from something else."""
    lines = "\n".join(f"  {line}" for line in differences[:12])
    more = f"\n  and {len(differences) - 12} more" if len(differences) > 12 else ""
    return UserError(
        f"{out} exists and was made otherwise:\n{lines}{more}", "--overwrite makes it anew, or name another --out"
    )


def _content(record: SourceRecord) -> tuple[str, int, str]:
    return record.kind, record.num_bytes, record.sha256


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
