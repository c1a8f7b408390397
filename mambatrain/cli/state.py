"""`state`: what a model remembers of a text, as a small file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mambatrain.cli.open_model import BaseOption, EndOption, TokenizerOption, WeightsArgument
from mambatrain.cli.plain_help import PlainCommand, within
from mambatrain.cli.train import Device, DeviceOption, Kernels, KernelsOption

if TYPE_CHECKING:
    import torch

    from mambatrain.cli.open_model import OpenModel
    from mambatrain.data.tokenizer import LoadedTokenizer
    from mambatrain.models.state import TextState
    from mambatrain.runs.state_file import StateFile


class StoredDtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


DtypeOption = Annotated[StoredDtype, typer.Option("--dtype", help="bf16: half the size, rounded.")]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE", help="An earlier state file there is replaced.")
]
StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state", metavar="FILE", help="Go on behind the text that it remembers; a trained one begins texts."
    ),
]

state_app = typer.Typer(no_args_is_help=True, help="Keep what a model remembers of a text.")


@state_app.command(cls=PlainCommand, short_help="Read a text and keep the state behind it.")
def make(
    weights: WeightsArgument,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text of any length.")],
    out: OutOption,
    state: StateOption = None,
    dtype: DtypeOption = StoredDtype.fp32,
    kernels: KernelsOption = Kernels.auto,
    device: DeviceOption = Device.auto,
    base: BaseOption = None,
    tokenizer: TokenizerOption = None,
    end_of_document: EndOption = None,
) -> None:
    """Read a text once and keep what the model remembers of it; the file's size does not depend on the text's.

    Example: mambatrain state make demo/run --text notes.txt -o notes.state.safetensors
    """
    import time

    from mambatrain.cli.open_model import open_model, open_tokenizer
    from mambatrain.data.progress import ByteProgress
    from mambatrain.errors import UserError
    from mambatrain.generation.document import read_document
    from mambatrain.generation.reading import Reader, boundary_behind
    from mambatrain.runs.state_file import refuse_to_replace

    refuse_to_replace(out)
    if not text.is_file():
        raise UserError(f"--text {text} is no file", "name a text file")
    opened = open_model(weights, kernels.value, device.value, base)
    loaded = open_tokenizer(opened, tokenizer, end_of_document)
    start = open_state(state, opened, loaded)
    before = None if start is None else start.state
    boundary_id = boundary_behind(before, loaded.end_of_document_id)
    reader = Reader(opened.model, boundary_id, before)
    if before is None or before.num_tokens == 0:
        reader.add([loaded.end_of_document_id])
    began, num_before = time.perf_counter(), reader.num_tokens
    with ByteProgress(f"reading {text.name}", text.stat().st_size) as progress:
        read_document(text, reader, loaded, progress.advance_to)
        behind = reader.state()
    seconds = time.perf_counter() - began
    num_new = behind.num_tokens - num_before
    typer.echo(f"read {num_new:,} tokens in {seconds:.1f} s ({num_new / seconds:,.0f} tokens/s)", err=True)
    told = text.name if start is None else f"{start.facts.text}, {text.name}"
    save_state(out, behind, opened, loaded, told, dtype, start)


@state_app.command(cls=PlainCommand, short_help="Say what a state file holds.")
def show(file: Annotated[Path, typer.Argument(metavar="FILE", help="A state file.")]) -> None:
    """Say what a state file holds: of which text, for which weights, how large.

    Example: mambatrain state show notes.state.safetensors
    """
    from mambatrain.runs.state_file import read_state_file

    for line in describe_state(read_state_file(file), file.stat().st_size):
        print(line)


@state_app.command(cls=PlainCommand, short_help="Mix two states of the same weights.")
def blend(
    one: Annotated[Path, typer.Argument(metavar="A", help="A state file.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same weights.")],
    weight: Annotated[
        float,
        typer.Option(
            "--weight",
            metavar="W",
            help="Of B, from 0 to 1; A has the rest.",
            callback=within(lambda value: 0.0 <= value <= 1.0, "from 0 to 1"),
        ),
    ],
    out: OutOption,
    dtype: DtypeOption = StoredDtype.fp32,
) -> None:
    """Mix two states: (1 - W) of A and W of B, number by number.

    Example: mambatrain state blend a.state.safetensors b.state.safetensors --weight 0.3 -o c.state.safetensors
    """
    from mambatrain.runs.state_file import blend_states, read_state_file, refuse_to_replace, write_state_file

    refuse_to_replace(out)
    state, facts = blend_states(read_state_file(one), read_state_file(other), weight)
    write_state_file(out, state, facts, torch_dtype(dtype))
    typer.echo(f"wrote {out}: {facts.text}", err=True)


def open_state(file: Path | None, opened: OpenModel, loaded: LoadedTokenizer) -> StateFile | None:
    """The state of a file on the model's device, in its dtype; None where no file is named.

    Raises:
        UserError: it cannot be read, or belongs to other weights or another tokenizer.
    """
    from dataclasses import replace

    from mambatrain.runs.state_file import place_state, read_state_file

    if file is None:
        return None
    found = read_state_file(file)
    placed = place_state(found, file, opened.weights, loaded.sha256, like=opened.model.head_weight)
    return replace(found, state=placed)


def save_state(
    out: Path,
    state: TextState,
    opened: OpenModel,
    loaded: LoadedTokenizer,
    text: str,
    dtype: StoredDtype,
    start: StateFile | None,
) -> None:
    """Writes a state of a text, read behind `start` where there is one, and says so on stderr."""
    from mambatrain.runs.state_file import facts_of, write_state_file

    template = None if start is None or start.facts.chat else start.facts.template
    facts = facts_of(opened.weights, loaded.sha256, text, state, template=template)
    write_state_file(out, state, facts, torch_dtype(dtype))
    typer.echo(f"wrote {out}: {state.num_tokens:,} tokens in {size_in_words(out.stat().st_size)}", err=True)


def torch_dtype(dtype: StoredDtype) -> torch.dtype:
    """The dtype of that name."""
    import torch

    return {StoredDtype.fp32: torch.float32, StoredDtype.bf16: torch.bfloat16}[dtype]


def size_in_words(num_bytes: int) -> str:
    """`2.4 MB`, `44 kB`."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"


def describe_state(found: StateFile, num_bytes: int) -> list[str]:
    """Lines for people."""
    from mambatrain.runs.state_file import count_numbers, shapes_of

    facts, shapes = found.facts, shapes_of(found.state)
    windows, states = count_numbers(shapes)
    dtype = "bf16" if found.dtype.itemsize == 2 else "fp32"
    (window, ssm), width = shapes[0], found.dtype.itemsize
    size = " x ".join
    lines = [
        f"text        {facts.text}",
        f"tokens      {facts.num_tokens:,}, {len(found.state.seen_ids):,} different ones"
        if facts.num_tokens
        else "tokens      none: a trained state, which stands before a text",
        f"model       {facts.block}, {len(shapes)} layers",
        f"weights     {facts.weights_origin}, sha256 {facts.weights_sha256}",
        f"tokenizer   sha256 {facts.tokenizer_sha256}",
        f"states      {len(shapes)} x {size(map(str, ssm))}, {dtype}: {size_in_words(states * width)}",
        f"windows     {len(shapes)} x {size(map(str, window))}, {dtype}: {size_in_words(windows * width)}",
        f"file        {size_in_words(num_bytes)}",
    ]
    if facts.template is not None:
        lines.append(f"template    {facts.template.name}")
    if facts.chat is not None:
        lines.append(f"chat        {len(facts.chat.messages)} messages; `mambatrain chat --state` goes on with it")
    return lines
