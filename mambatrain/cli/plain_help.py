"""Help as it is written here: names in place of Python types, and bounds that name the option they are about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand


class PlainCommand(TyperCommand):
    """Lists arguments by name alone; typer prints each one's Python type behind it."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
        for parameter in self.get_params(ctx):
            name, text = parameter.get_help_record(ctx) or ("", "")
            if parameter.param_type_name == "argument":
                name = parameter.metavar or name
            if name:
                records[parameter.param_type_name].append((name, text))
        for title, rows in (("Arguments", records["argument"]), ("Options", records["option"])):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def within(holds: Callable[[Any], bool], allowed: str) -> Callable[[Any], Any]:
    """Checks an option's value where `min` and `max` cannot: a wrong one is a usage error that names the option."""

    def check(value: Any) -> Any:
        if value is not None and not holds(value):
            raise typer.BadParameter(f"{value} is not {allowed}")
        return value

    return check
