"""What the tables of all formats have in common: names by prefix, settings by key, refusals by name and value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mambatrain.errors import UserError
from mambatrain.recipe import ModelSection

_NOT_OURS = "a model of other sizes or settings can be read"


@dataclass(frozen=True)
class NameTable:
    """Prefixes of tensor names: (theirs, ours). The first that fits is the one; behind it names are the same."""

    prefixes: tuple[tuple[str, str], ...]

    def ours(self, name: str) -> str | None:
        """Our name of their tensor, None where they have one that we do not know."""
        for theirs, ours in self.prefixes:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return None

    def theirs(self, name: str) -> str:
        """Their name of our tensor."""
        for theirs, ours in self.prefixes:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        raise KeyError(name)


def refuse_other_values(config: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]], origin: str) -> None:
    """Every key that is there has one of the values that our model computes.

    Raises:
        UserError: naming the key and its value.
    """
    for key, values in accepted.items():
        if key in config and config[key] not in values:
            raise UserError(
                f"{origin} has {key} = {config[key]!r}, which mambatrain's model cannot represent",
                f"only {' or '.join(repr(value) for value in values)} can be read",
            )


def section_from_settings(
    block: str, config: Mapping[str, Any], fields: Mapping[str, str], origin: str
) -> ModelSection:
    """The model section that a mapping of their keys describes.

    Args:
        block: mamba1 or mamba2.
        config: their key -> value; keys that are not in `fields` are not looked at, missing ones keep our default.
        fields: their key -> our field.
        origin: names the configuration in errors.

    Raises:
        UserError: naming their key, and the value that we cannot represent.
    """
    values = {ours: _as_int(config[theirs]) for theirs, ours in fields.items() if theirs in config}
    try:
        return ModelSection.model_validate({"block": block, **values})
    except ValidationError as error:
        theirs_of = {ours: theirs for theirs, ours in fields.items()}
        problem = error.errors()[0]
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            raise UserError(
                f"{origin} describes a model that mambatrain cannot represent: {message}", _NOT_OURS
            ) from None
        field = str(problem["loc"][0])
        raise UserError(
            f"{origin} has {theirs_of.get(field, field)} = {values.get(field)!r}, "
            f"which mambatrain's model cannot represent: {message}",
            _NOT_OURS,
        ) from None


def settings_from_section(section: ModelSection, fields: Mapping[str, str]) -> dict[str, Any]:
    """Their keys with our values; sizes that follow from others are spelled out."""
    resolved = {"d_state": section.state_size, "dt_rank": section.dt_rank_size}
    return {theirs: resolved.get(ours, getattr(section, ours)) for theirs, ours in fields.items()}


def _as_int(value: Any) -> Any:
    """2.0 is the whole number that some tools write for 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
