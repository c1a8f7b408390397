"""Training on which of two answers was preferred."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mambatrain.recipe.section import Section


class PreferenceSection(Section):
    """Direct preference optimization (DPO, arXiv 2305.18290); the reference is what training starts from."""

    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """A reward is beta times how much likelier an answer became than the reference has it, in nats."""
    length_normalised: bool = False
    """Each answer's log-probabilities are divided by its counted tokens (arXiv 2411.15124, with a beta of 5)."""
    references: str | None = None
    """Folder in which several runs keep the reference's log-probabilities; null: each run its own, beside its pairs."""
