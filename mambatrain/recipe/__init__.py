"""Recipes: what a run is."""

from mambatrain.recipe.files import (
    differing_settings,
    find_recipe,
    parse_recipe,
    read_recipe,
    shipped_recipes,
    write_recipe,
)
from mambatrain.recipe.sections import (
    IGNORED_TARGET,
    CheckpointSection,
    DataSection,
    EvaluationSection,
    ModelSection,
    OptimizerSection,
    Recipe,
    ScheduleSection,
    TrainingSection,
)

__all__ = [
    "IGNORED_TARGET",
    "CheckpointSection",
    "DataSection",
    "EvaluationSection",
    "ModelSection",
    "OptimizerSection",
    "Recipe",
    "ScheduleSection",
    "TrainingSection",
    "differing_settings",
    "find_recipe",
    "parse_recipe",
    "read_recipe",
    "shipped_recipes",
    "write_recipe",
]
