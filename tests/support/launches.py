"""Runs in several processes, as torchrun starts them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mambatrain.runs.folder import read_log
from mambatrain.runs.weights import read_weights

TWENTY_STEPS = {"training__total_steps": 20, "checkpoint__every_steps": 10, "evaluation__every_steps": 10}
MAMBA1 = {**TWENTY_STEPS, "model__block": "mamba1"}
MAMBA2 = {**TWENTY_STEPS, "model__block": "mamba2", "model__head_dim": 16}
UNTIED = {"model__tie_embeddings": False}
ACCUMULATED = {"training__rows_per_step": 12, "training__micro_batch_rows": 1}  # 3 each on 4 processes
# Answers alone count: few targets of a row, none of some of its parts, another number at each step and on each process.
MASKED = {
    "data": {
        "chats": {"files": ["{chats}"], "tokenizer": "{shards}/tokenizer.json", "held_out": 0.2},
        "row_tokens": 50,
    }
}
IN_FP64 = {"training__precision": "fp64"}
# What must come out the same however processes share the work.
PROMISED: dict[str, dict[str, Any]] = {
    "mamba1-fp64": {**MAMBA1, **IN_FP64},
    "mamba2-untied-accumulated-fp64": {**MAMBA2, **UNTIED, **ACCUMULATED, **IN_FP64},
    "mamba1-untied-masked-accumulated-fp64": {**MAMBA1, **UNTIED, **ACCUMULATED, **MASKED, **IN_FP64},
    "mamba2-masked-fp64": {**MAMBA2, **MASKED, **IN_FP64},
    "mamba1-untied-masked-fp32": {**MAMBA1, **UNTIED, **MASKED},
    "mamba2-accumulated-fp32": {**MAMBA2, **ACCUMULATED},
}


def launch(world_size: int, cases: list[dict[str, Any]], folder: Path) -> None:
    """Runs cases `{recipe, run, resume, shard, sequence, weights}` one after another in so many processes."""
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
    """A recipe of a tiny model, with changes by `section__field`; {shards} and {chats} stand for paths."""
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
    chats = file.with_name("chats.jsonl")
    if not chats.exists():
        chats.write_text("".join(json.dumps(chat) + "\n" for chat in _chats()))
    present = {section: settings for section, settings in content.items() if settings is not None}
    file.write_text(yaml.safe_dump(present).replace("{shards}", str(shards)).replace("{chats}", str(chats)))
    return file


def _chats() -> Iterator[dict[str, Any]]:
    for number in range(60):
        question, answer = "why " * (number % 5) + f"{number}?", f"{number}" * (1 + number % 7)
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def losses(run: Path) -> list[float]:
    """Of every step and every held-out evaluation, in the order of the log."""
    lines = [line for line in read_log(run / "log.jsonl") if line["event"] in {"step", "held_out"}]
    return [line.get("loss", line.get("held_out_loss")) for line in lines]


def assert_same_run(run: Path, alone: Path, tolerance: float) -> None:
    """The losses of another run, and its weights where the tolerance is that of fp64."""
    wanted = losses(alone)
    assert len(wanted) in (8 + 3, 20 + 3)  # steps, and the held-out losses
    assert losses(run) == pytest.approx(wanted, rel=tolerance)
    if tolerance <= 1e-10:
        weights = read_weights(str(alone)).tensors
        for name, value in read_weights(str(run)).tensors.items():
            torch.testing.assert_close(value, weights[name], rtol=tolerance, atol=tolerance, msg=name)


def tolerance_of(case: str) -> float:
    """By the precision that a case is named after.

    bf16: a gradient is rounded once more where it is summed over ranks, and a moment may be rounded the other way.
    """
    return 1e-10 if case.endswith("fp64") else 1e-5 if case.endswith("fp32") else 3e-3
