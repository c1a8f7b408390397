"""Mixtures and stages in a recipe: what is said of each mistake, and what the stages come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mambatrain.errors import UserError
from mambatrain.recipe import Recipe, annotate_recipe, parse_recipe, read_recipe, write_recipe
from mambatrain.recipe.yaml_text import format_yaml, parse_yaml

AB = [{"shards": "a", "weight": 0.7}, {"shards": "b", "weight": 0.3, "max_epochs": 2}]


def recipe_of(data: dict[str, Any], **training: Any) -> Recipe:
    return parse_recipe(content_of(data, **training), "r.yaml")


def content_of(data: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {
        "model": {"d_model": 8, "num_layers": 1, "vocab_size": 9},
        "data": {"row_tokens": 64, **data},
        "training": {"tokens_per_step": 256, "total_steps": 20, **training},
        "optimizer": {"learning_rate": 0.1},
    }


def problem_of(data: dict[str, Any], **training: Any) -> tuple[str, str | None]:
    with pytest.raises(UserError) as caught:
        recipe_of(data, **training)
    first, *lines = caught.value.message.split("\n  ")
    assert first == "r.yaml is not a valid recipe:"
    return "\n".join(lines), caught.value.hint


def test_one_folder_is_one_stage_of_one_source() -> None:
    (stage,) = recipe_of({"shards": "a"}).stages
    assert (stage.first_draw, stage.num_draws, stage.row_tokens, stage.rows_per_step) == (0, 20, 64, 4)
    assert [source.shards for source in stage.sources] == ["a"]


def test_stages_take_over_what_they_do_not_change() -> None:
    recipe = recipe_of(
        {
            "sources": AB,
            "stages": [
                {"from_tokens": 1000, "row_tokens": 128},
                {"from_tokens": 4096, "sources": [{"shards": "c", "weight": 1}]},
            ],
        }
    )
    seen = [
        (stage.first_draw, stage.num_draws, stage.row_tokens, stage.rows_per_step, [s.shards for s in stage.sources])
        for stage in recipe.stages
    ]
    assert seen == [(0, 4, 64, 4, ["a", "b"]), (4, 12, 128, 2, ["a", "b"]), (16, 4, 128, 2, ["c"])]
    assert recipe.data.all_shards == ["a", "b", "c"]
    assert recipe.data.longest_row_tokens == 128
    assert [stage.place for stage in recipe.stages] == ["data.sources", "data.sources", "data.stages.1.sources"]


def test_what_is_written_is_read_again() -> None:
    recipe = recipe_of({"sources": AB, "stages": [{"from_tokens": 1000, "row_tokens": 128}], "packing": "best_fit"})
    for text in (write_recipe(recipe), annotate_recipe(recipe)):
        assert parse_recipe(parse_yaml(text), "again.yaml") == recipe


@pytest.mark.parametrize(
    ("data", "line", "hint"),
    [
        ({}, "data: give exactly one of shards, sources and chats; null unsets", None),
        ({"shards": "a", "sources": AB}, "data: give exactly one of shards, sources and chats; null unsets", None),
        (
            {"sources": [{"shards": "a", "weigth": 0.7}]},
            "data.sources.0.weigth: no such setting",
            "did you mean `data.sources.weight`?",
        ),
        ({"sorces": AB, "shards": "a"}, "data.sorces: no such setting", "did you mean `data.sources`?"),
        (
            {"shards": "a", "stages": [{"from_token": 5, "sources": AB}]},
            "data.stages.0.from_tokens: missing\ndata.stages.0.from_token: no such setting",
            "did you mean `data.stages.from_tokens`?",
        ),
        (
            {"shards": "a", "stages": [{"from_tokens": 300, "row_token": 32}]},
            "data.stages.0.row_token: no such setting",
            "did you mean `data.stages.row_tokens`?",
        ),
        (
            {"sources": [{"shards": "a", "weight": "x"}]},
            "data.sources.0.weight: input should be a valid number, not 'x'",
            None,
        ),
        (
            {"sources": [{"shards": "a", "weight": 0}]},
            "data.sources.0.weight: input should be greater than 0, not 0",
            None,
        ),
        ({"sources": []}, "data.sources: list should have at least 1 item after validation, not 0, not []", None),
        ({"sources": [{"shards": "a"}]}, "data.sources.0: give exactly one of weight and tokens", None),
        (
            {"sources": [{"shards": "a", "weight": 1, "tokens": 5}]},
            "data.sources.0: give exactly one of weight and tokens",
            None,
        ),
        (
            {"sources": [{"shards": "a", "weight": 1}, {"shards": "b", "tokens": 5}]},
            "data: sources mix weights and budgets of tokens; give one kind",
            None,
        ),
        ({"sources": [AB[0], AB[0]]}, "data: sources name a twice", None),
        (
            {"shards": "a", "stages": [{"from_tokens": 9, "row_tokens": 4}, {"from_tokens": 9, "row_tokens": 8}]},
            "data: stages must begin one after the other, not at 9, 9 tokens",
            None,
        ),
        (
            {"shards": "a", "stages": [{"from_tokens": 9}]},
            "data: stages.0 changes nothing; give sources or row_tokens",
            None,
        ),
        (
            {"shards": "a", "stages": [{"from_tokens": 5120, "sources": AB}]},
            "data.stages: no step lies between 5,120 and 5,120 tokens",
            None,
        ),
        (
            {"shards": "a", "stages": [{"from_tokens": 300, "sources": AB}, {"from_tokens": 301, "row_tokens": 32}]},
            "data.stages: no step lies between 512 and 512 tokens",
            None,
        ),
        (
            {"shards": "a", "stages": [{"from_tokens": 300, "row_tokens": 96}]},
            "a step of 256 tokens does not hold whole rows of 96",
            None,
        ),
        (
            {"sources": [{"shards": "a", "tokens": 3000}, {"shards": "b", "tokens": 1800}]},
            "data.sources: the budgets sum to 4,800 tokens where the stage has 5,120 (20 steps of 256)",
            None,
        ),
        (
            {"shards": "a", "packing": "bestfit"},
            "data.packing: input should be 'auto', 'windows' or 'best_fit', not 'bestfit'",
            None,
        ),
    ],
)  # fmt: skip
def test_one_mistake(data: dict[str, Any], line: str, hint: str | None) -> None:
    said, general = problem_of(data)
    assert said.replace("\n  ", "\n") == line
    if hint is not None:
        assert general == hint


def test_rows_of_another_length_need_tokens_per_step() -> None:
    data = {"shards": "a", "stages": [{"from_tokens": 300, "row_tokens": 32}]}
    said, _ = problem_of(data, tokens_per_step=None, rows_per_step=4)
    assert said == "data.stages with rows of another length need training.tokens_per_step, not rows_per_step"
    recipe_of({**data, "stages": [{"from_tokens": 300, "sources": AB}]}, tokens_per_step=None, rows_per_step=4)


@pytest.mark.parametrize("tokens", [4900, 5120])
def test_budgets_are_the_length_of_their_stage_to_a_step(tokens: int) -> None:
    recipe = recipe_of({"sources": [{"shards": "a", "tokens": tokens - 1000}, {"shards": "b", "tokens": 1000}]})
    assert recipe.stages[0].num_draws == 20


def test_an_entry_of_a_list_is_set_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(format_yaml(content_of({"sources": AB})))
    recipe = read_recipe(str(file), ["data.sources.1.weight=0.5"])
    assert [source.weight for source in recipe.data.sources or []] == [0.7, 0.5]
    for override, said in (
        ("data.sources.2.weight=1", "2 is not one of 2 entries"),
        ("data.sources.b.weight=1", "b is not one of 2 entries"),
        ("data.sources.weight=1", "sources is a value, not a section"),
    ):
        with pytest.raises(UserError, match=f"--set {override}: {said}"):
            read_recipe(str(file), [override])


def test_the_nearest_name_is_found_across_lists() -> None:
    said, hint = problem_of({"shards": "a", "stages": [{"from_tokens": 9, "sources": [{"shard": "a", "weight": 1}]}]})
    assert "data.stages.0.sources.0.shard: no such setting" in said
    assert hint in ("did you mean `data.shards`?", "did you mean `data.stages.sources.shards`?")
