"""Processes that see different memory take the same rows at once and compute the same blocks again."""

import json
from pathlib import Path

from launches import launch, losses, write_case

FITS_NOTHING, FITS_ALL = 0, 2**40
AUTO = {"training__activation_checkpointing": "auto", "training__total_steps": 2, "training__precision": "fp64"}


def test_the_process_with_the_least_memory_decides_for_all(tmp_path: Path, short_shards: Path) -> None:
    recipe = str(write_case(tmp_path / "auto.yaml", short_shards, AUTO))
    # The divided run would wait for ever where one process took two micro-batches and the other one.
    memory = {
        "much": [FITS_ALL, FITS_ALL],
        "second-least": [FITS_ALL, FITS_NOTHING],
        "first-least": [FITS_NOTHING, FITS_ALL],
    }
    cases = [
        {"recipe": recipe, "run": str(tmp_path / name), "resume": "fresh", "free_bytes": free, "shard": "full"}
        for name, free in memory.items()
    ]
    launch(2, cases, tmp_path)
    found = {}
    for name in memory:
        facts = json.loads((tmp_path / name / "run.json").read_text())
        found[name] = facts["micro_batch_rows"], facts["recompute_every"]
    assert found == {"much": (2, 0), "second-least": (1, 1), "first-least": (1, 1)}
    assert losses(tmp_path / "second-least") == losses(tmp_path / "first-least")
