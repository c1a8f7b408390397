"""Every shipped recipe is valid, and its arithmetic is the papers'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mambatrain.models.flops import count_parameters
from mambatrain.recipe import ModelSection, Recipe, about_recipe, read_recipe, shipped_recipes

# Mamba: arXiv 2312.00752, table 12 and E.2.3. Mamba-2: arXiv 2405.21060, table 9 and D.3. The sizes are the names of
# the published weights. Peak rates: 5 x GPT-3's; 3 x for mamba-2.8b, by its authors' word.
#   parameters, d_model, layers, steps, tokens a step, tokens in all, peak learning rate
PAPER_SIZES = {
    "mamba1-130m": (130e6, 768, 24, 4_800, 2**19, 2.5e9, 5 * 6e-4),
    "mamba1-370m": (370e6, 1024, 48, 13_500, 2**19, 7e9, 5 * 3e-4),
    "mamba1-790m": (790e6, 1536, 48, 29_000, 2**19, 15e9, 5 * 2.5e-4),
    "mamba1-1.4b": (1.4e9, 2048, 48, 50_000, 2**19, 26e9, 5 * 2e-4),
    "mamba1-2.8b": (2.8e9, 2560, 64, 286_103, 2**20, 300e9, 3 * 1.6e-4),
    "mamba2-130m": (130e6, 768, 24, 4_800, 2**19, 2.5e9, 5 * 6e-4),
    "mamba2-370m": (370e6, 1024, 48, 13_500, 2**19, 7e9, 5 * 3e-4),
    "mamba2-780m": (780e6, 1536, 48, 29_000, 2**19, 15e9, 5 * 2.5e-4),
    "mamba2-1.3b": (1.3e9, 2048, 48, 50_000, 2**19, 26e9, 5 * 2e-4),
    "mamba2-2.7b": (2.7e9, 2560, 64, 286_103, 2**20, 300e9, 5 * 1.6e-4),
}
SMALLEST_MODEL = ModelSection(d_model=8, num_layers=1, vocab_size=16)


def read_shipped(name: str) -> Recipe:
    model = None if "\nmodel:" in shipped_recipes()[name].read_text(encoding="utf-8") else SMALLEST_MODEL
    return read_recipe(name, model=model)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    recipe = read_shipped(name)
    assert 20 < len(recipe.about) <= 120
    assert recipe.about == about_recipe(shipped_recipes()[name])


def test_the_recipes_shipped_are_the_ones_in_the_repository() -> None:
    here = Path(__file__).resolve().parents[3] / "recipes"
    assert {path.stem for path in here.glob("*.yaml")} == set(shipped_recipes()) >= {"demo", *PAPER_SIZES}


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_a_paper_size_has_the_papers_numbers(name: str) -> None:
    parameters, d_model, layers, steps, step_tokens, tokens, peak = PAPER_SIZES[name]
    recipe = read_recipe(name)
    assert (recipe.model.d_model, recipe.model.num_layers) == (d_model, layers)
    assert count_parameters(recipe.model)["total"] == pytest.approx(parameters, rel=0.035)
    assert (recipe.total_steps, recipe.tokens_per_step) == (steps, step_tokens)
    assert steps * step_tokens == pytest.approx(tokens, rel=0.015)
    assert recipe.optimizer.learning_rate == pytest.approx(peak)
    # The improved recipe of both papers.
    assert recipe.optimizer.learning_rate * recipe.schedule.final_fraction == pytest.approx(1e-5, rel=1e-3)
    assert (recipe.schedule.kind, recipe.warmup_steps) == ("cosine", pytest.approx(steps / 10, abs=1))
    assert (recipe.optimizer.beta1, recipe.optimizer.beta2, recipe.optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (recipe.training.clip_norm, recipe.model.proj_bias, recipe.model.tie_embeddings) == (1.0, False, True)
    assert (recipe.data.row_tokens, recipe.model.vocab_size) == (2048, 50_277)


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_the_about_line_agrees_with_the_settings(name: str) -> None:
    recipe = read_recipe(name)
    said = re.match(r"(Mamba(?:-2)?) (\S+) on (\S+)B tokens of FineWeb-Edu; arXiv (\S+), ", recipe.about)
    assert said is not None
    block = {"Mamba": "mamba1", "Mamba-2": "mamba2"}[said[1]]
    assert (recipe.model.block, f"{block}-{said[2].lower()}") == (block, name)
    assert float(said[3]) * 1e9 == pytest.approx(recipe.total_steps * recipe.tokens_per_step, rel=0.015)
    assert said[4] == {"mamba1": "2312.00752", "mamba2": "2405.21060"}[block]


@pytest.mark.parametrize("name", [name for name in PAPER_SIZES if name not in {"mamba1-2.8b", "mamba2-2.7b"}])
def test_the_flags_named_for_the_published_weights_give_300_billion_tokens(name: str) -> None:
    flags = re.findall(r"--set (\S+)", shipped_recipes()[name].read_text(encoding="utf-8"))
    recipe = read_recipe(name, flags)
    large_batch = recipe.model.d_model == 2048
    assert recipe.tokens_per_step == (2**20 if large_batch else 2**19)
    assert 0 <= recipe.total_steps * recipe.tokens_per_step - 300e9 < recipe.tokens_per_step


@pytest.mark.parametrize("kind", ["lora", "dora", "state"])
def test_conversations_take_an_adapter_by_a_flag(kind: str) -> None:
    recipe = read_recipe("chat", [f"adapter.kind={kind}"], model=SMALLEST_MODEL)
    assert recipe.adapter is not None and recipe.adapter.kind == kind
    assert recipe.trains_state == (kind == "state") and recipe.data.chats is not None


def test_the_demo_is_the_shape_that_the_documentation_tells() -> None:
    recipe = read_recipe("demo")
    assert count_parameters(recipe.model)["total"] == pytest.approx(3.7e6, rel=0.02)
    assert (recipe.tokens_per_step, recipe.total_steps) == (2048, 586)


def test_shipped_recipes_are_listed_by_family_from_small_to_large() -> None:
    names = [name for name in shipped_recipes() if name in PAPER_SIZES]
    assert names == list(PAPER_SIZES)
