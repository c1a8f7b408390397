"""`mambatrain recipes`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from mambatrain.recipe import about_recipe, read_recipe, shipped_recipes

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_list_names_every_shipped_recipe_on_a_line(run_mambatrain: Run) -> None:
    done = run_mambatrain("recipes", "list")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert lines == [[name, about_recipe(path)] for name, path in shipped_recipes().items()]


def test_show_prints_a_recipe_as_it_is_shipped(run_mambatrain: Run) -> None:
    done = run_mambatrain("recipes", "show", "mamba1-130m")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == shipped_recipes()["mamba1-130m"].read_text(encoding="utf-8")


def test_show_resolved_prints_every_setting_of_a_file(run_mambatrain: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(run_mambatrain("recipes", "show", "demo").stdout.replace("row_tokens: 512", "row_tokens: 64"))
    done = run_mambatrain("recipes", "show", "mine.yaml", "--resolved")
    assert (done.returncode, done.stderr) == (0, "")
    assert "  # L, tokens in one training row.\n  row_tokens: 64\n" in done.stdout
    again = tmp_path / "again.yaml"
    again.write_text(done.stdout)
    assert read_recipe(str(again)) == read_recipe(str(mine)) != read_recipe("demo")
