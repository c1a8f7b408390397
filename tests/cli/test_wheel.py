"""The wheel carries recipes and kernels, and works from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "mambatrain", "kernels", "recipes"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline, with the setuptools installed here, from a copy: building leaves files in the source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, source / name)
    run_pip("wheel", str(source), "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out))
    (built,) = out.glob("*.whl")
    return built


def run_pip(*arguments: str) -> None:
    command = [sys.executable, "-P", "-m", "pip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_holds_every_source_recipe_and_kernel(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "mambatrain").rglob("*.py")}
    expected |= {f"mambatrain/_recipes/{path.name}" for path in (REPOSITORY / "recipes").glob("*.yaml")}
    kernels = REPOSITORY / "kernels"
    files = [path for path in kernels.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files = [path for path in files if not path.name.startswith(".")]  # how they are formatted
    expected |= {f"mambatrain/_kernels/{path.relative_to(kernels)}" for path in files}
    expected |= {"mambatrain/py.typed", "mambatrain/_kernels/__init__.py", "mambatrain/_recipes/__init__.py"}
    assert expected - held == set()
    assert not [name for name in held if name.startswith(("kernels/", "recipes/", "tests/"))]
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_it_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run_pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    program = """
import sys
import mambatrain, mambatrain._kernels
from mambatrain.recipe import read_recipe, shipped_recipes
print(mambatrain.__file__, mambatrain._kernels.__file__, *shipped_recipes().values(), sep="\\n")
assert read_recipe("demo").total_steps == 586
"""
    environment = {**os.environ, "PYTHONPATH": str(site)}  # before the installation that runs this test
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    places = done.stdout.splitlines()
    assert len(places) > 10
    assert all(place.startswith(str(site)) for place in places)
