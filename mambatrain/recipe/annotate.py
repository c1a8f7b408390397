"""A recipe as YAML in which every setting stands under its meaning."""

from __future__ import annotations

from pydantic import BaseModel

from mambatrain.recipe.sections import Recipe
from mambatrain.recipe.yaml_text import format_yaml


def annotate_recipe(recipe: Recipe) -> str:
    """Every setting of a recipe, defaults included, each below a comment that says what it means."""
    return _annotate(recipe, indent="")


def _annotate(section: BaseModel, indent: str) -> str:
    lines = []
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            meaning = type(value).__doc__ or ""
            lines += ["", *_comment(meaning, indent), f"{indent}{name}:", _annotate(value, indent + "  ")]
        else:
            setting = format_yaml({name: plain[name]}).rstrip("\n").replace("\n", f"\n{indent}")
            lines += [*_comment(field.description or "", indent), indent + setting]
    return "\n".join(lines)


def _comment(meaning: str, indent: str) -> list[str]:
    return [f"{indent}# {line.strip()}".rstrip() for line in meaning.strip().splitlines()]
