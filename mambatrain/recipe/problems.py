"""What is wrong with a recipe, said so that a person can mend it: one line a setting, and one hint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mambatrain.errors import nearest
from mambatrain.recipe.sections import Recipe


def explain_problems(error: ValidationError) -> tuple[list[str], str | None]:
    """One line per setting that is wrong, and a hint for the first that has one."""
    messages: dict[str, list[str]] = {}  # a union gives one problem per branch; they belong to one line
    shown: dict[str, str] = {}
    hint: str | None = None
    for problem in error.errors():
        path = _setting_path(problem["loc"])
        messages.setdefault(path, []).append(_message(problem["type"], problem["msg"], problem["input"]))
        if problem["type"] not in {"extra_forbidden", "missing"} and not isinstance(problem["input"], dict):
            shown[path] = ", not null" if problem["input"] is None else f", not {problem['input']!r}"
        hint = hint or _hint_for(problem["type"], problem["loc"], problem["input"])
    return [_line(path, said, shown.get(path, "")) for path, said in messages.items()], hint


def _line(path: str, said: list[str], shown: str) -> str:
    said = list(dict.fromkeys(said))
    merged = " or ".join([said[0], *(text.removeprefix("input should be ") for text in said[1:])])
    return f"{path}: {merged}{shown}" if path else merged


def _message(kind: str, message: str, value: Any) -> str:
    if kind == "extra_forbidden":
        return "no such setting"
    if kind == "missing":
        return "missing"
    if kind == "model_type":
        return "input should be a section of settings"
    message = message.removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _hint_for(kind: str, location: tuple[str | int, ...], value: Any) -> str | None:
    if kind == "extra_forbidden":
        close = _nearest_setting([str(part) for part in location])
        return f"did you mean `{close}`?" if close else "`mambatrain recipes show demo --resolved` lists every setting"
    if kind == "missing" and location == ("model",):
        return "a recipe without a model starts from weights: `mambatrain finetune RECIPE --from WEIGHTS`"
    if kind == "bool_type":
        return "write true or false"
    if kind in {"int_type", "float_type"} and isinstance(value, str) and _is_number(value):
        return f"text in quotes is not a number: write {value} without them"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"this is a whole number: write {int(value)}"
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _nearest_setting(parts: list[str]) -> str | None:
    """What an unknown setting most likely meant: its name in another section, else a like name, in its own first."""
    *sections, name = [part for part in parts if not part.isdigit()]  # numbers are places in a list
    own_section = "".join(f"{section}." for section in sections)
    paths = list(_setting_paths(Recipe))[::-1]  # of two equal names the first in the file wins
    known = {path.rpartition(".")[2]: path for path in paths}
    if name in known:
        return known[name]
    beside = {path.rpartition(".")[2]: path for path in paths if path.startswith(own_section)}
    for names in (beside, known):
        close = nearest(name, list(names))
        if close:
            return names[close]
    return None


def _setting_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name in section.model_fields:
        yield prefix + name
        inner = _section_at(section, name)
        if inner is not None:
            yield from _setting_paths(inner, f"{prefix}{name}.")


def _section_at(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that a setting is, or that the entries of its list are."""
    field = section.model_fields.get(name)
    return _section_in(field.annotation) if field else None


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _setting_path(location: tuple[str | int, ...]) -> str:
    """The dotted path; what follows a setting in pydantic's location names the branch of a union."""
    parts: list[str] = []
    section: type[BaseModel] | None = Recipe
    for part in location:
        if section is None:
            break
        parts.append(str(part))
        section = section if isinstance(part, int) else _section_at(section, str(part))
    return ".".join(parts)
