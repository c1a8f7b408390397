"""What a divided model holds and sends, by hand and by the real model's parameters."""

from __future__ import annotations

import pytest
import torch

from mambatrain.models.language_model import LanguageModel
from mambatrain.ops.backends import choose_backend
from mambatrain.planning.hardware import GPUS, native_on_gpus
from mambatrain.planning.memory import plan_memory
from mambatrain.planning.plan import Place
from mambatrain.planning.sharding import Traffic, bytes_sent, gathered_at_once, units_of
from mambatrain.recipe import Recipe, read_recipe

SIZES = ["d_model=64", "num_layers=3", "vocab_size=96"]


def recipe_of(block: str) -> Recipe:
    return read_recipe(f"{block}-130m", [*(f"model.{one}" for one in SIZES), "data.row_tokens=64"])


def numbers_of(recipe: Recipe) -> tuple[int, int, int]:
    """Of a block's matrices that are multiplied in bf16, of the rest of it, and of what is in no block."""
    model = LanguageModel(recipe.model, choose_backend("torch", torch.device("cpu")))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    # dt_proj's bias stays fp32, and its matrix with it
    narrow = [name for name in sizes if name.startswith("layers.0.") and name.endswith("_proj.weight")]
    narrow = [name for name in narrow if "dt_proj" not in name]
    matrices = sum(sizes[name] for name in narrow)
    block = sum(size for name, size in sizes.items() if name.startswith("layers.0."))
    outside = sum(size for name, size in sizes.items() if not name.startswith("layers."))
    return matrices, block - matrices, outside


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_a_rank_holds_its_part_and_what_is_gathered(block: str, num_micro_batches: int) -> None:
    """2 divides every first dimension: there is no padding."""
    recipe, shards = recipe_of(block), 2
    matrices, rest, outside = numbers_of(recipe)
    whole = 3 * (matrices + rest) + outside
    place = Place(GPUS["h100"], False, 4, shards, "bf16", native_on_gpus(), 0.3)
    memory = plan_memory(recipe, place, num_micro_batches, 1)
    assert memory.weights == 4 * whole // shards
    assert memory.optimizer == 2 * memory.weights
    undivided = 4 * whole if num_micro_batches > 1 else 0  # gradients that are not summed over ranks yet
    assert memory.gradients == memory.weights + undivided
    # The embedding stays; beside it a block's matrices in bf16, and those of the next one, fetched ahead.
    gathered = 4 * outside + 2 * (2 * matrices)
    assert sum(gathered_at_once(units_of(recipe, "bf16", shards))) == gathered
    # A unit's gradients are whole in fp32, and again where they are handed to the sum over ranks.
    assert memory.communication == gathered + 2 * 4 * max(matrices, outside)


def test_what_each_rank_sends() -> None:
    """Rings: n - 1 of n parts, twice that where all have the sum; a state goes as it is."""
    assert bytes_sent([Traffic("all-reduce", 0, 800)], 8, 1) == 2 * 7 * 100
    divided = [Traffic("all-gather", 3, 800), Traffic("reduce-scatter", 3, 400), Traffic("all-reduce", 3, 100)]
    assert bytes_sent(divided, 8, 4) == 3 * 200 + 3 * 100 + 2 * 50  # two groups of 4, which have a shard each in common
    assert bytes_sent([Traffic("all-reduce", 0, 800), Traffic("states", 4, 36)], 8, 1) == 2 * 7 * 100 + 36
