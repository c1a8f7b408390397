"""`tokenize` and `tokenizer train`: text into tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mambatrain.cli.plain_help import PlainCommand, within

if TYPE_CHECKING:
    from mambatrain.data.manifest import TokenManifest

SOURCES_HELP = "Files or folders of text: .txt .md .py .jsonl .jsonl.gz .parquet."
TEXT_FIELD_HELP = "Field of JSON objects, or column of parquet files, that holds the text."
SKIP_BAD_HELP = "Leave out documents that cannot be read, and count them, instead of stopping."
OVERWRITE_HELP = "Replace an output that was made from other sources or with other options."

tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a tokenizer.")


def tokenize(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help=SOURCES_HELP, show_default=False)],
    tokenizer: Annotated[str, typer.Option(metavar="FILE", help="A tokenizer.json, or a folder that holds one.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the tokens; it appears when all is done.")],
    held_out: Annotated[
        float,
        typer.Option(
            metavar="FRACTION",
            help="Fraction of the documents to hold out, from 0 to below 1.",
            callback=within(lambda fraction: 0.0 <= fraction < 1.0, "a fraction from 0 to below 1"),
        ),
    ] = 0.01,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Decides the order of the documents.",
            callback=within(lambda seed: 0 <= seed < 2**64, "from 0 to 2^64 - 1"),
        ),
    ] = 0,
    text_field: Annotated[str, typer.Option(metavar="NAME", help=TEXT_FIELD_HELP)] = "text",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help=SKIP_BAD_HELP)] = False,
    end_of_document: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Name of the token that ends a document.", show_default="found by name"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE_HELP)] = False,
) -> None:
    """Turn text into token shards, shuffled by document, some documents held out.

    Example: mambatrain tokenize texts --tokenizer tokenizer.json --out tokens
    """
    from mambatrain.data.manifest import TokenizeOptions
    from mambatrain.data.tokenize_corpus import tokenize_corpus

    options = TokenizeOptions(held_out=held_out, seed=seed, text_field=text_field, skip_bad=skip_bad)
    done = tokenize_corpus(sources, tokenizer, out, options, end_of_document, overwrite)
    _tell_left_out(done.unread, done.bad, done.corpus.manifest.num_skipped_bad)
    if done.reused:
        print(f"{out} was already made from the same sources, tokenizer and options; it is used as it is")
    for line in token_summary(done.corpus.manifest, out):
        print(line)


@tokenizer_app.callback()
def tokenizer() -> None:
    """Train a tokenizer."""  # a callback keeps `train` a command of its own while it is the only one


@tokenizer_app.command(cls=PlainCommand)
def train(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help=SOURCES_HELP, show_default=False)],
    vocab_size: Annotated[
        int, typer.Option(metavar="N", min=257, help="Tokens in all: every byte, the end token, and more.")
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="The tokenizer.json to write.")],
    sample_bytes: Annotated[
        int,
        typer.Option(metavar="BYTES", min=1, help="UTF-8 bytes of text to learn from, drawn over the whole corpus."),
    ] = 100_000_000,
    text_field: Annotated[str, typer.Option(metavar="NAME", help=TEXT_FIELD_HELP)] = "text",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help=SKIP_BAD_HELP)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE_HELP)] = False,
) -> None:
    """Learn a byte-level BPE tokenizer from text.

    Example: mambatrain tokenizer train texts --vocab-size 4096 --out tok.json
    """
    from mambatrain.data.manifest import TokenizerSettings
    from mambatrain.data.train_tokenizer import train_tokenizer

    settings = TokenizerSettings(
        vocab_size=vocab_size, sample_bytes=sample_bytes, text_field=text_field, skip_bad=skip_bad
    )
    done = train_tokenizer(sources, out, settings, overwrite)
    manifest = done.manifest
    _tell_left_out(done.unread, done.bad, manifest.num_skipped_bad)
    if done.reused:
        print(f"{out} was already trained on the same sources with the same settings; it is used as it is")
    if manifest.vocab_size < vocab_size:
        print(f"note: the text gave {manifest.vocab_size:,} tokens, fewer than {vocab_size:,}", file=sys.stderr)
    print(f"tokens           {manifest.vocab_size:,}")
    print(f"trained on       {manifest.num_sampled_bytes:,} bytes of text")
    print(f"bytes per token  {manifest.bytes_per_token:.3f} {'held out' if manifest.held_out else 'on the same text'}")
    print(f"tokenizer        {out}")


def token_summary(manifest: TokenManifest, out: str) -> list[str]:
    """The lines that say what a folder of tokens holds."""
    train, held_out = manifest.train, manifest.held_out
    documents = train.num_documents + held_out.num_documents
    # Without the end token that opens each shard: it belongs to no document.
    num_held_out = held_out.num_tokens - 1
    tokens = train.num_tokens - 1 + num_held_out
    num_bytes = train.num_bytes + held_out.num_bytes
    return [
        f"documents        {documents:,} ({held_out.num_documents:,} held out)",
        f"skipped          {manifest.num_skipped_empty:,} empty, {manifest.num_skipped_bad:,} that cannot be read",
        f"tokens           {tokens:,} ({num_held_out:,} held out), with one that ends each document",
        f"bytes of text    {num_bytes:,}",
        f"bytes per token  {num_bytes / (tokens - documents):.3f}",
        f"written to       {out}",
    ]


def _tell_left_out(unread: Sequence[Path], bad: Sequence[str], num_bad: int) -> None:
    """Names on stderr what was found and not used."""
    if unread:
        named = ", ".join(str(path) for path in unread[:3])
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        print(f"note: not read, because of the ending: {named}{more}", file=sys.stderr)
    for line in bad:
        print(f"skipped: {line}", file=sys.stderr)
    if num_bad > len(bad) > 0:
        print(f"skipped: {num_bad - len(bad)} more", file=sys.stderr)
