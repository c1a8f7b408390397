"""How a token is drawn, as options: what `generate` and `chat` share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from mambatrain.cli.plain_help import within

if TYPE_CHECKING:
    from mambatrain.generation.sampling import SamplingSettings

TemperatureOption = Annotated[
    float,
    typer.Option(
        "--temperature",
        metavar="T",
        help="0 always takes the likeliest token.",
        callback=within(lambda value: 0.0 <= value < math.inf, "0 or more"),
    ),
]
TopPOption = Annotated[
    float,
    typer.Option(
        "--top-p",
        metavar="P",
        help="Only the likeliest tokens that together reach this probability; 1 is off.",
        callback=within(lambda value: 0.0 < value <= 1.0, "above 0 and at most 1"),
    ),
]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, metavar="N", help="Only the N likeliest tokens; 0 is off.")]
MinPOption = Annotated[
    float,
    typer.Option(
        "--min-p",
        metavar="P",
        help="Only tokens this many times as likely as the likeliest; 0 is off.",
        callback=within(lambda value: 0.0 <= value <= 1.0, "from 0 to 1"),
    ),
]
RepetitionPenaltyOption = Annotated[
    float,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        help="Above 1: what was said becomes unlikelier; 1 is off.",
        callback=within(lambda value: 0.0 < value < math.inf, "above 0"),
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        help="The same seed gives the same text. [default: a new one]",
        callback=within(lambda seed: 0 <= seed < 2**63, "from 0 to 2^63 - 1"),
    ),
]


def sampling_settings(
    temperature: float, top_p: float, top_k: int, min_p: float, repetition_penalty: float, seed: int | None
) -> SamplingSettings:
    """The options together; where no seed was given, a new one."""
    import secrets

    from mambatrain.generation.sampling import SamplingSettings

    return SamplingSettings(
        repetition_penalty=repetition_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=secrets.randbits(32) if seed is None else seed,
    )
