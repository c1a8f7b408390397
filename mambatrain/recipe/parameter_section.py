"""Which parameters are trained, and how fast beside the others."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mambatrain.recipe.section import Section


class RateSection(Section):
    """Parameters with a learning rate of their own."""

    match: Annotated[list[str], Field(min_length=1)]
    """Patterns of names: `*` stands for anything, as in layers.0.* or *.A_log; each has to fit some parameter."""
    times: Annotated[float, Field(gt=0.0)]
    """Their learning rate over that of the schedule."""


class ParameterSection(Section):
    """Which parameters are trained, and at which rate; by default all, at one."""

    frozen: list[str] = Field(default_factory=list)
    """Patterns of names of parameters that stay as they are, such as embedding.weight or layers.0.*."""
    rates: list[RateSection] = Field(default_factory=list)
    """Other learning rates, each `{match, times}`; no parameter may be matched twice."""


ALL_PARAMETERS = ParameterSection()
"""Nothing is frozen, and one rate is everyone's."""
