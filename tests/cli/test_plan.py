"""`plan`: a table on stdout, JSON, a dry run, and what it says of what cannot be."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[..., Path]


def test_the_table_and_the_json_say_the_same(run_mambatrain: Run, write_tiny_recipe: Write) -> None:
    recipe = write_tiny_recipe()
    table = run_mambatrain("plan", recipe, "--gpu", "cpu")
    assert table.returncode == 0, table.stderr
    for named in ("parameters", "12 steps", "FLOPs a token", "weights", "optimizer", "activations", "checkpoints"):
        assert named in table.stdout, named
    assert "It fits" in table.stdout
    plan = json.loads(run_mambatrain("plan", recipe, "--gpu", "cpu", "--json").stdout)
    assert plan["total_steps"] == 12 and plan["fits"] is True
    assert f"{plan['parameters']['total']:,}" in table.stdout
    assert plan["memory"]["weights"] == 4 * plan["parameters"]["total"]


def test_a_dry_run_counts_a_rank_of_a_cluster(run_mambatrain: Run, write_tiny_recipe: Write) -> None:
    recipe = write_tiny_recipe(training__rows_per_step=8)
    done = run_mambatrain(
        "plan", recipe, "--gpu", "h100", "--gpus", "8", "--shard", "full", "--kernels", "torch", "--dry-run", "--json"
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    counted = plan["dry_run"]
    assert (counted["num_devices"], counted["shards"]) == (8, 8)
    assert [one["kind"] for one in counted["traffic"]] == ["all-gather", "reduce-scatter"]
    assert counted["traffic"] == plan["traffic"], "the formula and the rank that was built disagree"
    assert counted["weights"] == plan["memory"]["weights"]


def test_rows_may_be_shared_and_blocks_computed_again(run_mambatrain: Run, write_tiny_recipe: Write) -> None:
    recipe = write_tiny_recipe(training__activation_checkpointing="auto", training__micro_batch_rows=2)
    arguments = ["plan", recipe, "--gpu", "h100", "--gpus", "8", "--sequence", "4", "--kernels", "torch"]
    done = run_mambatrain(*arguments)
    assert done.returncode == 0, done.stderr
    assert "each group of 4 processes: 1 x 2 rows of 32 tokens a step, of which each has 8 tokens" in done.stdout
    assert "no block is computed again" in done.stdout
    plan = json.loads(run_mambatrain(*arguments, "--json").stdout)
    assert plan["recompute_every"] == 0
    # d_model 16, E 32, N 8: of each layer 3 x 32 + 32 x 8 numbers travel, of two rows, to the right and to the left.
    states = 2 * 2 * (3 * 32 + 32 * 8) * 4 * 2
    assert plan["traffic"][1] == {"kind": "states", "count": 2 * 2, "num_bytes": states}
    summed = 2 * 7 / 8 * plan["traffic"][0]["num_bytes"]
    assert plan["sent_bytes_per_step"] == int(summed + states)


def test_what_cannot_be_planned_gets_a_sentence(run_mambatrain: Run, write_tiny_recipe: Write) -> None:
    recipe = write_tiny_recipe()
    for arguments, said in (
        (["--gpu", "h300"], "h300"),
        (["--gpus", "3", "--gpu", "h100"], "4 rows a step do not divide into 3 processes"),
        (["--gpus", "4", "--gpu", "h100", "--shard", "3"], "do not divide into groups of 3"),
        (["--dry-run", "--gpu", "h100"], "--shard"),
        (["--gpus", "4", "--gpu", "h100", "--sequence", "3"], "do not divide into groups of 3"),
        (["--gpus", "4", "--gpu", "h100", "--sequence", "2", "--shard", "full"], "--sequence 2 does not go with"),
        (
            ["--gpus", "4", "--gpu", "h100", "--sequence", "2", "--set", "training.segment_tokens=8"],
            "does not go with training.segment_tokens",
        ),
    ):
        done = run_mambatrain("plan", recipe, *arguments)
        assert done.returncode != 0, arguments
        assert said in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
