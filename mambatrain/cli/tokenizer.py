"""`tokenizer train` and `tokenizer inspect`."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from mambatrain.cli.plain_help import PlainCommand
from mambatrain.cli.tokens import (
    Overwrite,
    SkipBad,
    Sources,
    StandardInput,
    Streaming,
    Template,
    TextField,
    tell_left_out,
)

tokenizer_app = typer.Typer(no_args_is_help=True, help="Train and look into tokenizers.")


@tokenizer_app.command(cls=PlainCommand, short_help="Learn a tokenizer from text.")
def train(
    sources: Sources,
    vocab_size: Annotated[
        int, typer.Option(metavar="N", min=257, help="Tokens in all: every byte, the end token, and more.")
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="The tokenizer.json to write.")],
    pretokenizer: Annotated[
        Literal["gpt-2", "llama-bpe", "qwen2", "smollm"],
        typer.Option(help="How text is split before anything is merged, by llama.cpp's names."),
    ] = "gpt-2",
    special_token: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN", help="A special token behind <|endoftext|>, whose id is 0. Repeatable."),
    ] = None,
    sample_bytes: Annotated[
        int,
        typer.Option(metavar="BYTES", min=1, help="UTF-8 bytes of text to learn from, drawn over the whole corpus."),
    ] = 100_000_000,
    text_field: TextField = "text",
    template: Template = None,
    skip_bad: SkipBad = False,
    stdin: StandardInput = "jsonl",
    streaming: Streaming = False,
    overwrite: Overwrite = False,
) -> None:
    """Learn a byte-level BPE tokenizer from text.

    Example: mambatrain tokenizer train texts --vocab-size 4096 --out tok.json
    """
    from mambatrain.data.manifest import TokenizerSettings
    from mambatrain.data.train_tokenizer import train_tokenizer

    settings = TokenizerSettings(
        vocab_size=vocab_size,
        sample_bytes=sample_bytes,
        pretokenizer=pretokenizer,
        special_tokens=special_token or [],
        text_field=text_field,
        template=template,
        skip_bad=skip_bad,
    )
    done = train_tokenizer(sources, out, settings, overwrite, stdin, streaming)
    manifest = done.manifest
    tell_left_out(done.unread, done.bad, manifest.num_skipped_bad)
    if done.reused:
        print(f"{out} was already trained on the same sources with the same settings; it is used as it is")
    if manifest.vocab_size < vocab_size:
        print(f"note: the text gave {manifest.vocab_size:,} tokens, fewer than {vocab_size:,}", file=sys.stderr)
    print(f"tokens           {manifest.vocab_size:,}")
    print(f"trained on       {manifest.num_sampled_bytes:,} bytes of text")
    print(f"bytes per token  {manifest.bytes_per_token:.3f} {'held out' if manifest.held_out else 'on the same text'}")
    print(f"tokenizer        {out}")


@tokenizer_app.command(cls=PlainCommand, short_help="Show the pieces that a text becomes.")
def inspect(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A tokenizer.json, a folder that holds one, hf://NAME, or a .model.")
    ],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text; - for standard input.", show_default=False)],
    end_of_document: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Name of the token that ends a document.", show_default="found by name"),
    ] = None,
) -> None:
    """Show the pieces that a text becomes, an id and a piece a line; what is known of the tokenizer goes to stderr.

    Example: mambatrain tokenizer inspect tokenizer.json "It's a test"
    """
    from mambatrain.data.inspect_tokenizer import describe_tokenizer, pieces_of
    from mambatrain.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(file, end_of_document)
    content = sys.stdin.read() if text == "-" else text
    pieces = pieces_of(loaded, content)
    for token, piece in pieces:
        print(f"{token:>7}  {piece}")
    num_bytes = len(content.encode())
    rate = f", {num_bytes / len(pieces):.3f} bytes per token" if pieces else ""
    print(f"{len(pieces):,} tokens, {num_bytes:,} bytes{rate}", file=sys.stderr)
    for line in describe_tokenizer(loaded):
        print(line, file=sys.stderr)
