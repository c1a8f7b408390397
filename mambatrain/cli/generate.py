"""`generate`: a prompt continued, at constant memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mambatrain.cli.open_model import BaseOption, EndOption, TokenizerOption, WeightsArgument
from mambatrain.cli.sampling_options import (
    MinPOption,
    RepetitionPenaltyOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    sampling_settings,
)
from mambatrain.cli.state import StateOption
from mambatrain.cli.train import Device, DeviceOption, Kernels, KernelsOption

if TYPE_CHECKING:
    from mambatrain.data.tokenizer import LoadedTokenizer
    from mambatrain.generation.reading import Reader
    from mambatrain.generation.sampling import SamplingSettings


def generate(
    weights: WeightsArgument,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help='Text to continue; "" starts a document.')
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="UTF-8 text; - reads standard input.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Stop after this many.")
    ] = 200,
    temperature: TemperatureOption = 0.8,
    top_p: TopPOption = 0.95,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: SeedOption = None,
    state: StateOption = None,
    save_state: Annotated[
        Path | None, typer.Option("--save-state", metavar="FILE", help="Keep the state behind all of the text.")
    ] = None,
    kernels: KernelsOption = Kernels.auto,
    device: DeviceOption = Device.auto,
    base: BaseOption = None,
    tokenizer: TokenizerOption = None,
    end_of_document: EndOption = None,
) -> None:
    """Continue a prompt: the new text on stdout, as it comes; seed and speed on stderr.

    Example: mambatrain generate demo/run --prompt "def main():" --max-new-tokens 100 --seed 1
    """
    if prompt is not None and len(prompt) > 1:
        raise typer.BadParameter("given more than once; one text is continued by a command", param_hint="'--prompt'")
    text = _read_prompt(prompt[0] if prompt else None, prompt_file, needed=state is None)
    from mambatrain.cli.open_model import open_model, open_tokenizer, record_step
    from mambatrain.cli.state import StoredDtype, open_state
    from mambatrain.cli.state import save_state as write_state
    from mambatrain.generation.generate import open_document
    from mambatrain.generation.reading import Reader, boundary_behind
    from mambatrain.runs.state_file import refuse_to_replace

    settings = sampling_settings(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    if save_state is not None:
        refuse_to_replace(save_state)
    opened = open_model(weights, kernels.value, device.value, base)
    loaded = open_tokenizer(opened, tokenizer, end_of_document)
    start = open_state(state, opened, loaded)
    ids = loaded.encode_batch([text])[0].tolist() if text else []
    before = None if start is None else start.state
    boundary_id = boundary_behind(before, loaded.end_of_document_id)
    step = record_step(opened, boundary_id)
    reader = Reader(opened.model, boundary_id, before, step)
    begins = before is None or before.num_tokens == 0
    reader.add(open_document(ids, loaded.end_of_document_id) if begins else ids)
    _show_prompt(text)
    new = _write_continuation(reader, loaded, ids, max_new_tokens, settings)
    if save_state is not None:
        told = (text + new)[:40].replace("\n", " ")
        told = f"{start.facts.text}, {told}" if start else told
        write_state(save_state, reader.state(), opened, loaded, told, StoredDtype.fp32, start)


def _write_continuation(
    reader: Reader, loaded: LoadedTokenizer, ids: list[int], max_new_tokens: int, settings: SamplingSettings
) -> str:
    """New text to stdout piece by piece, then the facts to stderr; gives the new text."""
    import time

    from mambatrain.generation.generate import generate as generate_ids
    from mambatrain.generation.text_stream import stream_text

    start, num_before, pieces = time.perf_counter(), reader.num_tokens, []
    new_ids = generate_ids(
        reader,
        end_of_document=loaded.end_of_document_id,
        vocab_size=loaded.vocab_size,
        max_new_tokens=max_new_tokens,
        settings=settings,
    )
    for piece in stream_text(new_ids, loaded.tokenizer, before=ids):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print(flush=True)
    seconds, num_new = time.perf_counter() - start, reader.num_tokens - num_before
    ending = "--max-new-tokens reached" if num_new == max_new_tokens else "the document ended"
    typer.echo(
        f"read {len(ids)} and wrote {num_new} tokens in {seconds:.1f} s ({num_new / seconds:.1f} tokens/s), "
        f"seed {settings.seed}; {ending}",
        err=True,
    )
    return "".join(pieces)


def _read_prompt(prompt: str | None, file: Path | None, needed: bool) -> str:
    import sys

    from mambatrain.errors import UserError

    if prompt is None and file is None and not needed:
        return ""
    if (prompt is None) == (file is None):
        raise typer.BadParameter(
            'give one of the two; --prompt "" starts a document from nothing',
            param_hint="'--prompt' / '--prompt-file'",
        )
    if prompt is not None:
        return prompt
    assert file is not None
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise UserError(
            f"--prompt-file {file} cannot be read: {error.strerror}", "name a text file, or - for standard input"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt-file {file} is not UTF-8: byte {error.start}", "convert it, e.g. with iconv"
        ) from error


def _show_prompt(text: str) -> None:
    """Dim, and only for a person: a pipe gets the new text alone."""
    import sys

    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        Console().print(Text(text, style="dim"), end="", soft_wrap=True)
