"""`recipes`: what is shipped, and what its settings mean."""

from __future__ import annotations

from typing import Annotated

import typer

from mambatrain.cli.plain_help import PlainCommand

recipes_app = typer.Typer(no_args_is_help=True, help="List the shipped recipes, show one.")


@recipes_app.command("list", cls=PlainCommand)
def list_recipes() -> None:
    """Name each shipped recipe and say what it trains.

    Example: mambatrain recipes list
    """
    from mambatrain.recipe import about_recipe, shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped))
    for name, path in shipped.items():
        print(f"{name:{width}}  {about_recipe(path)}")


@recipes_app.command(cls=PlainCommand)
def show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The name of a shipped recipe, or a YAML file.")],
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Every setting, defaults included, with its meaning.")
    ] = False,
) -> None:
    """Print a recipe as it is shipped: a start for one's own.

    Example: mambatrain recipes show demo > my_recipe.yaml
    """
    from mambatrain.recipe import annotate_recipe, find_recipe, read_recipe

    print(
        annotate_recipe(read_recipe(recipe)) if resolved else find_recipe(recipe).read_text(encoding="utf-8").rstrip()
    )
