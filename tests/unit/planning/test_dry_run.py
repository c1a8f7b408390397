"""What plan says by formula of a divided model is what one fake rank of it counts."""

from __future__ import annotations

import pytest

from mambatrain.planning.dry_run import run_dry
from mambatrain.planning.hardware import GPUS, native_on_gpus
from mambatrain.planning.memory import plan_memory
from mambatrain.planning.plan import Place
from mambatrain.planning.sharding import traffic_of
from mambatrain.recipe import Recipe, read_recipe

RANKS = 8


def recipe_of(block: str, *more: str) -> Recipe:
    settings = ("d_model=64", "num_layers=2", "vocab_size=100", "head_dim=16", f"block={block}")
    if block == "mamba1":
        settings = tuple(one for one in settings if not one.startswith("head_dim"))
    return read_recipe("mamba2-130m", [*(f"model.{one}" for one in settings), "data.row_tokens=64", *more])


@pytest.mark.parametrize(
    ("block", "precision", "shards", "num_micro_batches", "settings"),
    [
        # 8 does not divide all of the first dimensions: shards are padded
        ("mamba2", "bf16", 8, 1, ["training.activation_checkpointing=every_block"]),
        ("mamba2", "fp32", 4, 3, ["model.tie_embeddings=false"]),  # HSDP, accumulation
        ("mamba1", "bf16", 8, 2, []),  # dt_proj has a bias that stays fp32: it travels with the others
        ("mamba1", "bf16", 2, 1, ["optimizer.kind=muon"]),
    ],
)
def test_what_is_planned_is_what_a_rank_counts(
    block: str, precision: str, shards: int, num_micro_batches: int, settings: list[str]
) -> None:
    recipe = recipe_of(block, f"training.precision={precision}", *settings)
    place = Place(GPUS["h100"], False, RANKS, shards, precision, native_on_gpus(), 0.3)  # type: ignore[arg-type]
    counted = run_dry(recipe, place, 1, num_micro_batches)
    planned = plan_memory(recipe, place, num_micro_batches, 1)
    assert counted.weights == planned.weights > 0
    assert counted.optimizer == planned.optimizer > 0
    # Behind the backward pass; on the way the undivided gradients of earlier micro-batches are there, too.
    assert counted.gradients == counted.weights
    assert (planned.gradients > counted.gradients) == (num_micro_batches > 1)
    assert counted.traffic == traffic_of(recipe, place.precision, RANKS, shards, num_micro_batches)
