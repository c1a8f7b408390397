"""Runs in several processes, as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mambatrain.runs.folder import read_log


def launch(world_size: int, cases: list[dict[str, Any]], folder: Path) -> None:
    """Runs cases `{recipe, run, resume, shard, sequence}` one after another in so many processes."""
    file = folder / f"cases-{world_size}.json"
    file.write_text(json.dumps(cases))
    worker = Path(__file__).parents[1] / "distributed" / "worker.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    done = subprocess.run(
        [sys.executable, *torchrun, worker, file],
        env={**os.environ, "OMP_NUM_THREADS": "1", "EXPECTED_WORLD_SIZE": str(world_size)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def write_case(file: Path, shards: Path, changes: dict[str, Any]) -> Path:
    """A recipe of a tiny model, with changes by `section__field`; {shards}, {folder}: where tokens and recipe lie."""
    import yaml

    content: dict[str, Any] = {
        "model": {"block": "mamba1", "d_model": 16, "num_layers": 2, "vocab_size": 512, "d_state": 8},
        "data": {"shards": str(shards), "row_tokens": 24},
        "training": {"rows_per_step": 4, "total_steps": 8, "precision": "fp32"},
        "optimizer": {"learning_rate": 0.01},
        "evaluation": {"every_steps": 4, "max_tokens": 300},
        "checkpoint": {"every_steps": 4, "keep_newest": 9},
    }
    for path, value in changes.items():
        section, _, field = path.partition("__")
        if field:
            content[section][field] = value
        else:
            content[section] = value
    file.write_text(yaml.safe_dump(content).replace("{shards}", str(shards)).replace("{folder}", str(file.parent)))
    return file


def losses(run: Path) -> list[float]:
    """Of every step and every held-out evaluation, in the order of the log."""
    lines = [line for line in read_log(run / "log.jsonl") if line["event"] in {"step", "held_out"}]
    return [line.get("loss", line.get("held_out_loss")) for line in lines]
