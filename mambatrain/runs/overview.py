"""What a run folder tells from outside: how far it is, how good, in which state, how large. No torch is needed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mambatrain.errors import UserError
from mambatrain.recipe import Recipe, read_recipe
from mambatrain.runs.checkpoint import list_checkpoints, step_of
from mambatrain.runs.folder import RunFolder, read_log_end

State = Literal["finished", "stopped", "running", "interrupted", "unreadable"]
MAX_DEPTH = 3  # folders below the one that is searched: runs/of_a_sweep/at_a_size


@dataclass(frozen=True)
class RunSummary:
    """One line of `runs list`."""

    path: Path
    model: str
    """Block and width of the model, for people."""
    step: int
    """Applied updates, by the log."""
    total_steps: int
    tokens_seen: int
    bits_per_byte: float | None
    """Held out, the last that was measured."""
    state: State
    """running: a process holds the folder. stopped: it was asked to. interrupted: killed, or failed."""
    seconds_since_change: float
    """Since the last line of the log; of the recipe where there is none."""
    num_bytes: int
    """On disk, checkpoints and earlier runs that were moved aside included."""
    problem: str | None = None
    """Why it is unreadable."""


def find_runs(folder: Path) -> list[Path]:
    """The run folders at and below a folder, by name; hidden folders and what lies within a run are passed over.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", "name the folder that holds the runs: mambatrain runs list DIR")
    return list(_walk(folder, MAX_DEPTH))


def open_run(path: Path) -> RunFolder:
    """The run folder at a path.

    Raises:
        UserError: there is no run there.
    """
    run = RunFolder(path)
    if not run.exists():
        raise UserError(f"{path} is no run: it holds no recipe.yaml", "mambatrain runs list DIR names those below DIR")
    return run


def summarise_run(run: RunFolder) -> RunSummary:
    """How a run stands; one whose recipe or log cannot be read has the state `unreadable`."""
    changed = run.log_file if run.log_file.is_file() else run.recipe_file
    age, size = max(0.0, time.time() - changed.stat().st_mtime), folder_bytes(run.path)
    try:
        recipe = read_recipe(str(run.recipe_file))
        end = read_log_end(run.log_file, frozenset({"step", "held_out"}))
        step, tokens_seen = (int(end["step"][counter]) if "step" in end else 0 for counter in ("step", "tokens_seen"))
    except (UserError, KeyError) as error:
        problem = error.message if isinstance(error, UserError) else f"{run.log_file} has a step without {error}"
        return RunSummary(run.path, "?", 0, 0, 0, None, "unreadable", age, size, problem)
    return RunSummary(
        path=run.path,
        model=f"{recipe.model.block} {recipe.model.d_model}x{recipe.model.num_layers}",
        step=step,
        total_steps=recipe.total_steps,
        tokens_seen=tokens_seen,
        bits_per_byte=end.get("held_out", {}).get("held_out_bits_per_byte"),
        state=_state_of(run, recipe),
        seconds_since_change=age,
        num_bytes=size,
    )


def read_run_facts(run: RunFolder) -> dict[str, Any]:
    """What run.json says; nothing where it is missing or damaged."""
    with suppress(OSError, ValueError):
        facts = json.loads(run.facts_file.read_text(encoding="utf-8"))
        if isinstance(facts, dict):
            return facts
    return {}


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; one that goes away meanwhile counts nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(root) / name).lstat().st_size
    return total


def _state_of(run: RunFolder, recipe: Recipe) -> State:
    if run.is_running():
        return "running"
    checkpoints = list_checkpoints(run.path)
    if checkpoints and step_of(checkpoints[-1]) >= recipe.total_steps:
        return "finished"
    return "stopped" if run.stopped_marker.is_file() else "interrupted"


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    if RunFolder(folder).exists():
        yield folder
    elif depth > 0:
        with suppress(OSError):  # a folder of another user's
            for entry in sorted(folder.iterdir()):
                if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
                    yield from _walk(entry, depth - 1)
