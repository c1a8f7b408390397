"""`data`: look at tokens, check them, merge and split them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambatrain.cli.plain_help import PlainCommand, within
from mambatrain.cli.train import SetOption

if TYPE_CHECKING:
    from mambatrain.data.open_tokens import Tokens

data_app = typer.Typer(no_args_is_help=True, help="Look at tokens, check, merge and split them.")

ShardsArgument = Annotated[
    Path,
    typer.Argument(
        metavar="SHARDS",
        help="A folder that `tokenize` wrote, or a .bin/.idx pair of Megatron, NeMo or GPT-NeoX without its ending.",
        show_default=False,
    ),
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="FILE", help="tokenizer.json, where none lies beside the tokens."),
]
VocabOption = Annotated[
    int | None,
    typer.Option("--vocab-size", min=1, metavar="N", help="Ids lie below N. [default: what the manifest says]"),
]
JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the numbers as JSON; - writes them to stdout alone.")
]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder; it appears when all is done.")]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", help="Of the drawing.", callback=within(lambda seed: 0 <= seed < 2**64, "below 2^64")
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a folder of tokens at --out.")]


@data_app.command(cls=PlainCommand)
def inspect(
    shards: ShardsArgument,
    samples: Annotated[
        int, typer.Option("--samples", min=0, metavar="N", help="Documents to show, drawn at random.")
    ] = 2,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Draw the lengths as a PNG.")] = None,
    json_file: JsonOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Count documents, tokens, lengths and exact duplicates; show some documents with their boundaries.

    Example: mambatrain data inspect demo/shards --out lengths.png
    """
    from mambatrain.cli.token_tables import inspection_lines, sample_lines
    from mambatrain.data.inspect_tokens import inspect_tokens
    from mambatrain.data.open_tokens import open_tokens

    tokens = open_tokens(shards)
    loaded = _tokenizer_of(tokens, tokenizer)
    reports = inspect_tokens(tokens)
    say = _say_on(json_file)
    for line in inspection_lines(tokens, reports):
        say(line)
    for line in sample_lines(tokens, loaded, samples):
        say(line)
    if samples and loaded is None:
        typer.echo("note: no tokenizer lies beside the tokens: --tokenizer FILE shows their text", err=True)
    _write_json({"shards": str(shards), **{split: report.as_json() for split, report in reports.items()}}, json_file)
    if out is not None:
        from mambatrain.files import write_errors_named
        from mambatrain.report.length_histogram import draw_lengths

        with write_errors_named(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            draw_lengths({split: report.lengths for split, report in reports.items()}, out, f"documents of {shards}")
        typer.echo(f"wrote {out}", err=True)


@data_app.command(cls=PlainCommand)
def check(shards: ShardsArgument, vocab_size: VocabOption = None, json_file: JsonOption = None) -> None:
    """Compare digests; find ids outside the vocabulary and documents that do not end in the end token. Exit code 1.

    Example: mambatrain data check demo/shards
    """
    from dataclasses import asdict

    from mambatrain.data.check_tokens import check_tokens
    from mambatrain.data.open_tokens import open_tokens
    from mambatrain.errors import UserError

    tokens = open_tokens(shards)
    checked = check_tokens(tokens, vocab_size)
    _write_json(
        {
            "shards": str(shards),
            "num_problems": checked.num_problems,
            "problems": [asdict(problem) for problem in checked.problems],
            "not_checked": list(checked.not_checked),
        },
        json_file,
    )
    for line in checked.not_checked:
        typer.echo(f"not checked: {line}", err=True)
    if checked.num_problems:
        lines = "\n".join(f"  {problem}" for problem in checked.problems)
        more = checked.num_problems - len(checked.problems)
        raise UserError(
            f"{shards} is not as it should be ({checked.num_problems:,} found):\n{lines}"
            + (f"\n  and {more:,} more" if more else ""),
            "copy it again or make it again; documents count from 0, as in the index",
        )
    say = _say_on(json_file)
    for split, shard in tokens.shards.items():
        count = shard.num_documents - shard.num_opening
        say(f"{split:<9} {count:,} documents, {shard.num_tokens - shard.num_opening:,} tokens: nothing wrong")


@data_app.command(cls=PlainCommand)
def merge(
    folders: Annotated[
        list[Path], typer.Argument(metavar="SHARDS...", help="Folders of one tokenizer.", show_default=False)
    ],
    out: OutOption,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Put the documents of several folders into one, alternating at random; what was held out stays held out.

    Example: mambatrain data merge books/shards code/shards --out both/shards
    """
    from mambatrain.data.combine_tokens import merge_tokens

    _tell_combined(merge_tokens(folders, out, seed, overwrite), out)


@data_app.command(cls=PlainCommand)
def split(
    shards: ShardsArgument,
    held_out: Annotated[
        float,
        typer.Option(
            "--held-out",
            metavar="FRACTION",
            help="Fraction of the documents to hold out, rounded up.",
            callback=within(lambda fraction: 0.0 <= fraction < 1.0, "a fraction from 0 to below 1"),
        ),
    ],
    out: OutOption,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Deal all documents of a folder anew into those to train on and those held out.

    Example: mambatrain data split my_text_document --held-out 0.01 --out my/shards
    """
    from mambatrain.data.combine_tokens import split_tokens

    _tell_combined(split_tokens(shards, held_out, out, seed, overwrite), out)


@data_app.command(cls=PlainCommand)
def show(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A YAML file, the name of a shipped recipe, or a run.", show_default=False
        ),
    ],
    step: Annotated[int | None, typer.Option("--step", min=1, metavar="N", help="As the log counts, from 1.")] = None,
    draw: Annotated[
        int | None,
        typer.Option("--draw", min=0, metavar="N", help="As the log counts, from 0; skipped draws are draws, too."),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="K", help="Rows of the draw to show.")] = 4,
    conversations: Annotated[
        int, typer.Option("--conversations", min=1, metavar="K", help="How many, where no step is named.")
    ] = 2,
    weights: Annotated[
        str | None,
        typer.Option("--from", metavar="WEIGHTS", help="As `finetune` gets them: their model and tokenizer."),
    ] = None,
    overrides: SetOption = None,
    json_file: JsonOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Show exactly what the model sees at a step: text, document boundaries, targets that do not count.

    A bar and a number, e.g. ┃12┃, stand where document 12 begins and the state is reset; what is read but not
    predicted stands in ⟦brackets⟧. Of a recipe with conversations, without a step, some of them are shown one by one.

    Example: mambatrain data show demo --step 100 --rows 2
    """
    from mambatrain.cli.shown_data import open_shown_data, print_chats, print_rows
    from mambatrain.errors import UserError

    if step is not None and draw is not None:
        raise UserError("a step or a draw must be named, and not both", "for example --step 1")
    with open_shown_data(recipe, overrides, weights, tokenizer) as data:
        chats = [tokens for tokens in data.sources.values() if tokens.train.counted is not None]
        if step is None and draw is None and not chats:
            raise UserError("a step or a draw must be named, and not both", "for example --step 1")
        if step is None and draw is None:
            _write_json(print_chats(chats, conversations, json_file == "-"), json_file)
            return
        chosen = _draw_of(recipe, step, draw)
        known = [tokens for tokens in data.sources.values() if tokens.tokenizer_file is not None]
        loaded = _tokenizer_of((known or list(data.sources.values()))[0], tokenizer)
        _write_json(print_rows(data.order, chosen, rows, loaded, json_file == "-"), json_file)


def _draw_of(name: str, step: int | None, draw: int | None) -> int:
    """The draw that a step of a run was; before it was run, a step is the draw before it."""
    from mambatrain.errors import UserError
    from mambatrain.runs.folder import RunFolder, read_log

    run = RunFolder(Path(name))
    if draw is not None:
        return draw
    assert step is not None  # the caller's check
    if not run.exists():
        return step - 1
    steps = {line["step"]: line["draw"] for line in read_log(run.log_file) if line.get("event") == "step"}
    if step not in steps:
        raise UserError(
            f"{name} has not done step {step:,}; its log ends at {max(steps, default=0):,}", "name a --draw"
        )
    return int(steps[step])


def _tokenizer_of(tokens: Tokens, asked: Path | None) -> Any:
    """The tokenizer that was asked for, else the one beside the tokens, else None."""
    from mambatrain.data.tokenizer import load_tokenizer

    if asked is None and tokens.tokenizer_file is None:
        return None
    name = tokens.corpus.manifest.tokenizer.end_of_document if tokens.corpus is not None else None
    return load_tokenizer(asked or tokens.tokenizer_file or "", name if asked is None else None)


def _tell_combined(tokens: Tokens, out: Path) -> None:
    for split, shard in tokens.shards.items():
        count = shard.num_documents - shard.num_opening
        print(f"{split:<11} {count:,} documents, {shard.num_tokens - shard.num_opening:,} tokens")
    print(f"written to  {out}")


def _say_on(json_file: str | None) -> Any:
    """Prints to stdout, unless that is for the JSON."""
    return lambda line: typer.echo(line, err=json_file == "-")


def _write_json(results: dict[str, Any], json_file: str | None) -> None:
    import json

    from mambatrain.files import write_errors_named, write_text_whole

    if json_file is None:
        return
    text = json.dumps(results, indent=2, ensure_ascii=False)
    if json_file == "-":
        print(text)
        return
    with write_errors_named(json_file):
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        write_text_whole(Path(json_file), text + "\n")
    typer.echo(f"wrote {json_file}", err=True)
