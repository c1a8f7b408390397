"""`tokenize`: text into tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mambatrain.cli.plain_help import within

if TYPE_CHECKING:
    from mambatrain.data.manifest import TokenManifest

SOURCES_HELP = (
    "Files, folders or patterns of text (.txt .md, code, .jsonl .json .parquet .arrow; .gz and .zst), "
    "- for standard input, hf://NAME[:CONFIG][@REVISION][#SPLIT]."
)
TEXT_FIELD_HELP = "Field of JSON objects, or column of tables, that holds the text."
TEMPLATE_HELP = r"Several fields in one text instead, for example '{title}\n\n{body}'."
SKIP_BAD_HELP = "Leave out documents that cannot be read, and count them, instead of stopping."
OVERWRITE_HELP = "Replace an output that was made from other sources or with other options."
STDIN_HELP = "What standard input holds: a JSON object a line, or one text."
STREAMING_HELP = "Read hf:// data sets row by row instead of downloading them whole."

Sources = Annotated[list[str], typer.Argument(metavar="SOURCE", help=SOURCES_HELP, show_default=False)]
TextField = Annotated[str, typer.Option(metavar="NAME", help=TEXT_FIELD_HELP)]
Template = Annotated[str | None, typer.Option(metavar="TEXT", help=TEMPLATE_HELP, show_default=False)]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help=SKIP_BAD_HELP)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help=OVERWRITE_HELP)]
StandardInput = Annotated[Literal["jsonl", "txt"], typer.Option("--stdin", help=STDIN_HELP)]
Streaming = Annotated[bool, typer.Option("--streaming", help=STREAMING_HELP)]

Tokenizer = Annotated[
    str,
    typer.Option(
        metavar="FILE", help="A tokenizer.json, a folder that holds one, hf://NAME, or a SentencePiece .model."
    ),
]
HeldOut = Annotated[
    float,
    typer.Option(
        metavar="FRACTION",
        help="Fraction of the documents to hold out, from 0 to below 1.",
        callback=within(lambda fraction: 0.0 <= fraction < 1.0, "a fraction from 0 to below 1"),
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Decides the order of the documents.",
        callback=within(lambda seed: 0 <= seed < 2**64, "from 0 to 2^64 - 1"),
    ),
]
EndOfDocument = Annotated[
    str | None,
    typer.Option(metavar="TOKEN", help="Name of the token that ends a document.", show_default="found by name"),
]
Normalize = Annotated[Literal["NFC", "NFKC"] | None, typer.Option(help="Unicode normalization.", show_default="none")]
MinCharacters = Annotated[int, typer.Option(metavar="N", min=0, help="Leave out shorter documents.")]
MaxCharacters = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Leave out longer documents.", show_default="no limit")
]
Deduplicate = Annotated[bool, typer.Option("--deduplicate", help="Keep the first of documents with the same text.")]
NearDuplicates = Annotated[
    float | None,
    typer.Option(
        metavar="SIMILARITY",
        help="Keep the first of nearly equal documents: Jaccard similarity of their word 5-grams, for example 0.8.",
        callback=within(lambda similarity: 0.0 < similarity < 1.0, "between 0 and 1"),
        show_default="all are kept",
    ),
]
Decontaminate = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Leave out documents that share 13 words in a row with these. Repeatable."),
]
Workers = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Threads that encode.", show_default="one a core")
]

_COUNTS = {
    "num_too_short": "shorter than --min-characters",
    "num_too_long": "longer than --max-characters",
    "num_contaminated": "that share text with --decontaminate files",
    "num_duplicates": "with the text of another",
    "num_near_duplicates": "nearly the same as another",
}
_NOTES = {
    "num_with_nul": "hold NUL characters, which were kept",
    "num_with_crlf": "hold CRLF line ends, which were kept",
    "num_normalized": "were changed by --normalize",
    "num_changed_by_tokenizer": "are changed by the tokenizer's own normalizer: decoding gives not quite their text",
}


def tokenize(
    sources: Sources,
    tokenizer: Tokenizer,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the tokens; it appears when all is done.")],
    held_out: HeldOut = 0.01,
    seed: Seed = 0,
    text_field: TextField = "text",
    template: Template = None,
    skip_bad: SkipBad = False,
    end_of_document: EndOfDocument = None,
    normalize: Normalize = None,
    min_characters: MinCharacters = 0,
    max_characters: MaxCharacters = None,
    deduplicate: Deduplicate = False,
    near_duplicates: NearDuplicates = None,
    decontaminate: Decontaminate = None,
    stdin: StandardInput = "jsonl",
    streaming: Streaming = False,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn text into token shards, shuffled by document, some documents held out.

    Stopped at any moment, the same command continues; the result is the same.

    Example: mambatrain tokenize texts --tokenizer tokenizer.json --out tokens
    """
    from mambatrain.data.manifest import CleaningOptions, TokenizeOptions
    from mambatrain.data.tokenize_corpus import HowToRead, tokenize_corpus

    cleaning = CleaningOptions(
        normalize=normalize,
        min_characters=min_characters,
        max_characters=max_characters,
        deduplicate=deduplicate,
        near_duplicates=near_duplicates,
    )
    options = TokenizeOptions(
        held_out=held_out, seed=seed, text_field=text_field, template=template, skip_bad=skip_bad, cleaning=cleaning
    )
    how = HowToRead(num_workers=workers, standard_input=stdin, streaming=streaming)
    try:
        done = tokenize_corpus(sources, tokenizer, out, options, end_of_document, overwrite, how, decontaminate or ())
    except KeyboardInterrupt:
        print("the same command continues where this one was stopped", file=sys.stderr)
        raise
    tell_left_out(done.unread, done.bad, done.corpus.manifest.num_skipped_bad)
    for name, what in _NOTES.items():
        count = getattr(done.corpus.manifest, name)
        if count and not done.reused:
            print(f"note: {count:,} documents {what}", file=sys.stderr)
    if done.reused:
        print(f"{out} was already made from the same sources, tokenizer and options; it is used as it is")
    for line in token_summary(done.corpus.manifest, out):
        print(line)


def token_summary(manifest: TokenManifest, out: str) -> list[str]:
    """The lines that say what a folder of tokens holds."""
    train, held_out = manifest.train, manifest.held_out
    documents = train.num_documents + held_out.num_documents
    # Without the end token that opens each shard: it belongs to no document.
    num_held_out = held_out.num_tokens - 1
    tokens = train.num_tokens - 1 + num_held_out
    num_bytes = train.num_bytes + held_out.num_bytes
    left_out = [(getattr(manifest, name), what) for name, what in _COUNTS.items()]
    return [
        f"documents        {documents:,} ({held_out.num_documents:,} held out)",
        f"skipped          {manifest.num_skipped_empty:,} empty, {manifest.num_skipped_bad:,} that cannot be read",
        *[f"left out         {count:,} {what}" for count, what in left_out if count],
        f"tokens           {tokens:,} ({num_held_out:,} held out), with one that ends each document",
        f"bytes of text    {num_bytes:,}",
        f"bytes per token  {num_bytes / (tokens - documents):.3f}",
        f"written to       {out}",
    ]


def tell_left_out(unread: Sequence[Path], bad: Sequence[str], num_bad: int) -> None:
    """Names on stderr what was found and not used."""
    if unread:
        named = ", ".join(str(path) for path in unread[:3])
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        print(f"note: not read, because of the ending: {named}{more}", file=sys.stderr)
    for line in bad:
        print(f"skipped: {line}", file=sys.stderr)
    if num_bad > len(bad) > 0:
        print(f"skipped: {num_bad - len(bad)} more", file=sys.stderr)
