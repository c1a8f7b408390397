"""Recipes: what a run is."""

from mambatrain.recipe.adapter_section import AdapterSection
from mambatrain.recipe.annotate import annotate_recipe
from mambatrain.recipe.chat_section import ChatSection
from mambatrain.recipe.data_section import CHATS, DataSection, SourceSection, Stage, StageSection
from mambatrain.recipe.files import (
    about_recipe,
    differing_settings,
    find_recipe,
    parse_recipe,
    read_recipe,
    shipped_recipes,
    write_recipe,
)
from mambatrain.recipe.preference_section import PreferenceSection
from mambatrain.recipe.sections import (
    CheckpointSection,
    EvaluationSection,
    GuardsSection,
    ModelSection,
    OptimizerSection,
    Recipe,
    ScheduleSection,
    TrainingSection,
)

__all__ = [
    "CHATS",
    "AdapterSection",
    "ChatSection",
    "CheckpointSection",
    "DataSection",
    "EvaluationSection",
    "GuardsSection",
    "ModelSection",
    "OptimizerSection",
    "PreferenceSection",
    "Recipe",
    "ScheduleSection",
    "SourceSection",
    "Stage",
    "StageSection",
    "TrainingSection",
    "about_recipe",
    "annotate_recipe",
    "differing_settings",
    "find_recipe",
    "parse_recipe",
    "read_recipe",
    "shipped_recipes",
    "write_recipe",
]
