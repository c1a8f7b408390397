"""Parameters chosen by patterns of their names: every pattern has to fit something."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from mambatrain.errors import UserError, nearest
from mambatrain.recipe.parameter_section import ParameterSection


def matching_names(patterns: Sequence[str], names: Sequence[str], setting: str) -> list[str]:
    """The names that fit any of the patterns, in their own order.

    Args:
        patterns: `*`, `?` and `[...]` as in file names; dots are nothing special.
        names: of all parameters.
        setting: of the recipe, for the error.

    Raises:
        UserError: a pattern fits no name; with the nearest names.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = _nearest_name(pattern, names)
            raise UserError(f"{setting}: no parameter fits {pattern}", f"did you mean {close}?")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def frozen_names(section: ParameterSection, names: Sequence[str]) -> set[str]:
    """Which parameters stay as they are.

    Raises:
        UserError: a pattern fits nothing, or nothing would be trained.
    """
    frozen = matching_names(section.frozen, names, "parameters.frozen")
    if len(frozen) == len(names):
        raise UserError("parameters.frozen leaves nothing to train", "name fewer parameters")
    return set(frozen)


def freeze_parameters(model: nn.Module, section: ParameterSection) -> None:
    """Takes the gradient from what is frozen.

    Raises:
        UserError: as `frozen_names`.
    """
    frozen = frozen_names(section, [name for name, _ in model.named_parameters()])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def rates_of(section: ParameterSection, names: Sequence[str]) -> dict[str, float]:
    """Name -> its learning rate over the schedule's, for all of them.

    Raises:
        UserError: a pattern fits nothing, or a parameter is named twice or is frozen.
    """
    frozen = frozen_names(section, names)
    rates: dict[str, float] = {}
    for number, group in enumerate(section.rates):
        setting = f"parameters.rates.{number}.match"
        for name in matching_names(group.match, names, setting):
            if name in rates or name in frozen:
                other = "frozen" if name in frozen else "in an entry before"
                raise UserError(f"{setting} names {name}, which is {other}", "let each parameter be named once")
            rates[name] = group.times
    return {name: rates.get(name, 1.0) for name in names}


def _nearest_name(pattern: str, names: Sequence[str]) -> str:
    """A pattern that fits something and is most like the one that does not."""
    fitting: dict[str, str] = {}  # part of a name -> pattern that finds it
    for name in names:
        parts = name.split(".")
        for first in range(len(parts)):
            for stop in range(first + 1, len(parts) + 1):
                part = ".".join(parts[first:stop])
                fitting.setdefault(part, ("*." if first else "") + part + (".*" if stop < len(parts) else ""))
    close = nearest(pattern.strip("*."), list(fitting))
    return fitting[close] if close else f"one of {', '.join(list(names)[:3])}, ..."
