"""What a run does about draws that would harm it, and how often it looks at its own health."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mambatrain.recipe.section import PositiveInt, Section


class GuardsSection(Section):
    """Draws that are not applied; those whose loss or gradient is not finite never are."""

    max_sigma: Annotated[float, Field(gt=0.0)] | None = None
    """Also skip a loss or gradient norm this many standard deviations above its running mean; null: no limit."""
    memory_draws: Annotated[int, Field(ge=2)] = 200
    """Over how many applied draws mean and deviation run; there is no limit before the first half of them."""
    max_skipped_in_a_row: PositiveInt = 10
    """As many skipped draws one after the other end the run, with the parameters and documents involved."""
    health_every_steps: PositiveInt | None = None
    """Interval of the health line: step sizes, decay, state and gradient of each layer; null: none."""
