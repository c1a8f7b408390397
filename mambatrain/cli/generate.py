"""`generate`: a prompt continued, at constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mambatrain.cli.open_model import EndOption, TokenizerOption, WeightsArgument
from mambatrain.cli.plain_help import within
from mambatrain.cli.train import Device, DeviceOption, Kernels, KernelsOption

if TYPE_CHECKING:
    from mambatrain.cli.open_model import OpenModel
    from mambatrain.data.tokenizer import LoadedTokenizer
    from mambatrain.generation.sampling import SamplingSettings


def generate(
    weights: WeightsArgument,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help='Text to continue; "" starts a document.')
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="UTF-8 text; - reads standard input.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Stop after this many.")
    ] = 200,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            metavar="T",
            help="0 always takes the likeliest token.",
            callback=within(lambda value: 0.0 <= value < math.inf, "0 or more"),
        ),
    ] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            metavar="P",
            help="Only the likeliest tokens that together reach this probability; 1 is off.",
            callback=within(lambda value: 0.0 < value <= 1.0, "above 0 and at most 1"),
        ),
    ] = 0.95,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, metavar="N", help="Only the N likeliest tokens; 0 is off.")
    ] = 0,
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p",
            metavar="P",
            help="Only tokens this many times as likely as the likeliest; 0 is off.",
            callback=within(lambda value: 0.0 <= value <= 1.0, "from 0 to 1"),
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            "--repetition-penalty",
            metavar="X",
            help="Above 1: what was said becomes unlikelier; 1 is off.",
            callback=within(lambda value: 0.0 < value < math.inf, "above 0"),
        ),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            help="The same seed gives the same text. [default: a new one]",
            callback=within(lambda seed: 0 <= seed < 2**63, "from 0 to 2^63 - 1"),
        ),
    ] = None,
    kernels: KernelsOption = Kernels.auto,
    device: DeviceOption = Device.auto,
    tokenizer: TokenizerOption = None,
    end_of_document: EndOption = None,
) -> None:
    """Continue a prompt: the new text on stdout, as it comes; seed and speed on stderr.

    Example: mambatrain generate demo/run --prompt "def main():" --max-new-tokens 100 --seed 1
    """
    import secrets

    text = _read_prompt(prompt, prompt_file)
    from mambatrain.cli.open_model import open_model, open_tokenizer
    from mambatrain.generation.sampling import SamplingSettings

    settings = SamplingSettings(
        repetition_penalty=repetition_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=secrets.randbits(32) if seed is None else seed,
    )
    opened = open_model(weights, kernels.value, device.value)
    loaded = open_tokenizer(opened, tokenizer, end_of_document)
    _show_prompt(text)
    _write_continuation(opened, loaded, text, max_new_tokens, settings)


def _write_continuation(
    opened: OpenModel, loaded: LoadedTokenizer, text: str, max_new_tokens: int, settings: SamplingSettings
) -> None:
    """New text to stdout piece by piece, then the facts to stderr."""
    import time

    from mambatrain.generation.generate import generate as generate_ids
    from mambatrain.generation.generate import stream_text

    start = time.perf_counter()
    ids = loaded.encode_batch([text])[0].tolist() if text else []
    num_new = 0

    def count() -> Iterator[int]:
        nonlocal num_new
        for token in generate_ids(
            opened.model,
            ids,
            end_of_document=loaded.end_of_document_id,
            vocab_size=loaded.vocab_size,
            max_new_tokens=max_new_tokens,
            settings=settings,
        ):
            num_new += 1
            yield token

    for piece in stream_text(count(), loaded.tokenizer, before=ids):
        print(piece, end="", flush=True)
    print(flush=True)
    seconds = time.perf_counter() - start
    ending = "--max-new-tokens reached" if num_new == max_new_tokens else "the document ended"
    typer.echo(
        f"read {len(ids)} and wrote {num_new} tokens in {seconds:.1f} s ({num_new / seconds:.1f} tokens/s), "
        f"seed {settings.seed}; {ending}",
        err=True,
    )


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    import sys

    from mambatrain.errors import UserError

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
