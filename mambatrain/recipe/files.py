"""Recipes on disk: YAML in, --set over it, one clear error for everything that is wrong, YAML out."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mambatrain.errors import UserError, nearest
from mambatrain.recipe.problems import explain_problems
from mambatrain.recipe.sections import ModelSection, Recipe
from mambatrain.recipe.yaml_text import format_yaml, parse_yaml

_EXAMPLE = "a recipe is a YAML text file: `mambatrain recipes show demo` prints an example"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package; those of one family from small to large."""
    folder = Path(str(files("mambatrain._recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: _family_and_size(path.stem))}


def _family_and_size(name: str) -> tuple[str, float]:
    """`mamba1-1.4b` -> ("mamba1", 1.4e9)."""
    size = re.fullmatch(r"(.+)-([0-9.]+)([mb])", name)
    return (size[1], float(size[2]) * {"m": 1e6, "b": 1e9}[size[3]]) if size else (name, 0.0)


def about_recipe(path: Path) -> str:
    """The `about` line of a recipe; of one without a model of its own, too."""
    return str(_read_content(path).get("about", ""))


def find_recipe(name: str) -> Path:
    """A file's path, or the name of a shipped recipe.

    Raises:
        UserError: neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        raise UserError(f"{name} is a folder, not a recipe", "name a .yaml file")
    stem = path.stem if path.suffix in {".yaml", ".yml"} else name
    close = nearest(stem, list(shipped))
    hint = (
        f"did you mean the shipped recipe `{close}`?" if close else "`mambatrain recipes list` names the shipped ones"
    )
    raise UserError(f"there is no recipe file or shipped recipe named {name}", hint)


def read_recipe(name: str, overrides: list[str] | None = None, model: ModelSection | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        name: a YAML file or the name of a shipped recipe.
        overrides: `path.to.field=value` texts; the value is read as YAML.
        model: the model of the weights that training starts from. The recipe may leave its own section out, and must
            mean the same model where it has one.

    Raises:
        UserError: listing everything that is wrong, with dotted paths and nearest names.
    """
    path = find_recipe(name)
    content = _read_content(path)
    if model is not None:
        content.setdefault("model", model.model_dump())
    for override in overrides or []:
        _apply_override(content, override)
    recipe = parse_recipe(content, origin=str(path))
    if model is None:
        return recipe
    theirs, ours = model.architecture, recipe.model.architecture
    differing = [f"  {key}: {theirs[key]} -> {ours[key]}" for key in theirs if theirs[key] != ours[key]]
    if differing:
        raise UserError(
            f"{path} describes another model than that of the weights:\n" + "\n".join(differing),
            "leave the model section out: the weights say what the model is",
        )
    return recipe.model_copy(update={"model": model})


def parse_recipe(content: dict[str, Any], origin: str) -> Recipe:
    """The recipe that a mapping of sections describes; `origin` names it in errors."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines, hint = explain_problems(error)
        said = "\n".join(f"  {line}" for line in lines)
        general = "`mambatrain recipes show demo --resolved` says what each setting means"
        raise UserError(f"{origin} is not a valid recipe:\n{said}", hint or general) from None


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every setting spelled out."""
    return format_yaml(recipe.model_dump(mode="json"))


def differing_settings(one: Recipe, other: Recipe) -> list[str]:
    """`path: value -> value` for every setting in which two recipes differ; what they say about themselves is none."""
    before, after = (_flatten(recipe.model_dump(mode="json", exclude={"about"})) for recipe in (one, other))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def _read_content(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}", _EXAMPLE) from None
    except ValueError as error:
        raise UserError(f"{path} is not readable YAML: {error}", _EXAMPLE) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", _EXAMPLE) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping of sections", _EXAMPLE)
    return content


def _apply_override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(
            f"--set {override} is not of the form path.to.field=value", "for example --set data.row_tokens=512"
        )
    *sections, field = path.split(".")
    place: Any = content
    for section in sections:
        # Entries of a list (of sources, of stages) count from 0.
        place = _entry(place, section, override) if isinstance(place, list) else place.setdefault(section, {})
        if not isinstance(place, dict) and (not isinstance(place, list) or section == sections[-1]):
            raise UserError(
                f"--set {override}: {section} is a value, not a section", "for example --set data.row_tokens=512"
            )
    try:
        place[field] = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"--set {override}: the value is not readable YAML: {error}", "quote it") from None


def _entry(entries: list[Any], index: str, override: str) -> Any:
    if not index.isdigit() or int(index) >= len(entries):
        raise UserError(
            f"--set {override}: {index} is not one of {len(entries)} entries",
            f"they count from 0 to {len(entries) - 1}",
        )
    return entries[int(index)]


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
