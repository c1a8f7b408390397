"""Recipes on disk: YAML in, --set over it, one clear error for everything that is wrong, YAML out."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mambatrain.errors import UserError, nearest
from mambatrain.recipe.sections import Recipe


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's scalars: `3e-4` is a number, `on` and `no` are text, a key twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_RecipeLoader.yaml_implicit_resolvers = {}
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), list("~nN") + [""])
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9](?:_?[0-9])*$"), list("-+0123456789"))
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9](?:_?[0-9])*\.[0-9_]*|\.[0-9]+|[0-9](?:_?[0-9])*)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf)$"),
    list("-+.0123456789"),
)
# YAML 1.1's constructor reads a leading zero as octal; 1.2 does not.
_RecipeLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", ""), 10))
_RecipeLoader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value.replace("_", "")))


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package."""
    folder = Path(str(files("mambatrain._recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


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
    hint = f"did you mean the shipped recipe `{close}`?" if close else "`mambatrain recipes list` names the shipped ones"
    raise UserError(f"there is no recipe file or shipped recipe named {name}", hint)


def read_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        name: a YAML file or the name of a shipped recipe.
        overrides: `path.to.field=value` texts; the value is read as YAML.

    Raises:
        UserError: listing everything that is wrong, with dotted paths and nearest names.
    """
    path = find_recipe(name)
    try:
        content = _parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML: {error}", "check the indentation of the line named") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping of sections", "`mambatrain recipes show demo` prints an example")
    for override in overrides or []:
        _apply_override(content, override)
    return parse_recipe(content, origin=str(path))


def parse_recipe(content: dict[str, Any], origin: str) -> Recipe:
    """The recipe that a mapping of sections describes; `origin` names it in errors."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines, hint = _explain(error)
        raise UserError(f"{origin} is not a valid recipe:\n" + "\n".join(f"  {line}" for line in lines), hint) from None


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every setting spelled out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def differing_settings(one: Recipe, other: Recipe) -> list[str]:
    """`path: value -> value` for every setting in which two recipes differ."""
    before, after = _flatten(one.model_dump(mode="json")), _flatten(other.model_dump(mode="json"))
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in {**before, **after} if before.get(key) != after.get(key)]


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_RecipeLoader)  # noqa: S506  (a SafeLoader underneath)


def _apply_override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override} is not of the form path.to.field=value", "for example --set data.row_tokens=512")
    *sections, field = path.split(".")
    place = content
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise UserError(f"--set {override}: {section} is a value, not a section")
    try:
        place[field] = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not readable YAML: {error}") from error


def _explain(error: ValidationError) -> tuple[list[str], str | None]:
    """One line per problem and, for the first misspelled key, the nearest right name."""
    lines, hint = [], None
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"] if not _is_union_branch(part))
        if problem["type"] == "extra_forbidden":
            close = nearest(str(problem["loc"][-1]), _fields_at(problem["loc"][:-1]))
            lines.append(f"{path}: no such setting")
            if close and hint is None:
                hint = f"did you mean `{'.'.join([*map(str, problem['loc'][:-1]), close])}`?"
        elif problem["type"] == "missing":
            lines.append(f"{path}: missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(problem["input"], dict | BaseModel) else f", not {problem['input']!r}"
            lines.append(f"{path}: {message[0].lower()}{message[1:]}{shown}" if path else message)
    return list(dict.fromkeys(lines)), hint


def _is_union_branch(part: str | int) -> bool:
    """pydantic names the branch of a union in the path: `constrained-int`, `literal['auto']`."""
    return isinstance(part, str) and re.fullmatch(r"[a-z_]+", part) is None


def _fields_at(location: tuple[str | int, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        section = annotation
    return list(section.model_fields)


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
