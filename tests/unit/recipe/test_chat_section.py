"""What a recipe of conversations may say."""

from __future__ import annotations

from typing import Any

import pytest

from mambatrain.errors import UserError
from mambatrain.recipe import CHATS, Recipe, parse_recipe, write_recipe
from mambatrain.recipe.yaml_text import parse_yaml


def recipe_of(data: dict[str, Any]) -> Recipe:
    content = {
        "model": {"d_model": 8, "num_layers": 1, "vocab_size": 16},
        "data": {"row_tokens": 64, **data},
        "training": {"rows_per_step": 2, "total_steps": 4},
        "optimizer": {"learning_rate": 1e-3},
    }
    return parse_recipe(content, "a test")


def test_conversations_stand_in_the_place_of_shards() -> None:
    recipe = recipe_of({"chats": {"files": ["a.jsonl"], "count": ["user", "assistant"]}})
    assert recipe.data.all_shards == [CHATS]
    assert [source.shards for stage in recipe.stages for source in stage.sources] == [CHATS]
    written = parse_yaml(write_recipe(recipe))
    assert isinstance(written, dict) and parse_recipe(written, "again") == recipe


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({}, "data: give exactly one of shards, sources and chats; null unsets"),
        ({"chats": {"files": ["a"]}, "shards": "b"}, "data: give exactly one of shards, sources and chats"),
        ({"chats": {"files": []}}, "data.chats.files: "),
        ({"chats": {"files": ["-"]}}, "files names standard input"),
        ({"chats": {"files": ["a"], "cuont": ["user"]}}, "data.chats.cuont: no such setting"),
        ({"chats": {"files": ["a"], "count": ["robot"]}}, "data.chats.count: input should be 'system'"),
        ({"chats": {"files": ["a"], "count": ["user", "user"]}}, "count names one twice"),
        ({"chats": {"files": ["a"], "new_tokens": ["<a>", "<a>"]}}, "new_tokens names one twice"),
        ({"chats": {"files": ["a"], "new_tokens": [""]}}, "new_tokens names an empty token"),
        (
            {"chats": {"files": ["a"], "format": "alpaca", "prompt_field": "q"}},
            "belongs to format prompt_completion",
        ),
        ({"chats": {"files": ["a"]}, "packing": "windows"}, "packing windows, which cuts conversations anywhere,"),
        (
            {"chats": {"files": ["a"]}, "stages": [{"from_tokens": 64, "row_tokens": 32}]},
            "stages does not go with",
        ),
    ],
)
def test_one_mistake(data: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError) as told:
        recipe_of(data)
    assert problem in told.value.message
