"""The Dockerfile without Docker: what it copies exists, and its install commands run in a fresh environment."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLS = os.environ.get("MAMBATRAIN_TEST_INSTALL") == "1"


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, its text) of the Dockerfile, continued lines joined."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def texts_of(instruction: str) -> list[str]:
    return [text for name, text in instructions() if name == instruction]


def copy_sources(root: Path) -> None:
    """What COPY puts under /src, put under root/src, less what .dockerignore keeps out."""
    for text in texts_of("COPY"):
        *sources, target = shlex.split(text)
        for source in sources:
            end = root / target.lstrip("/")
            if (REPOSITORY / source).is_dir():
                shutil.copytree(REPOSITORY / source, end, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                end.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / source, end)


def test_it_ends_as_an_ordinary_user_with_the_command() -> None:
    names = [name for name, _ in instructions()]
    assert texts_of("FROM")[0].startswith("nvidia/cuda:")
    assert texts_of("USER") == ["trainer"]
    assert names.count("USER") == 1
    assert texts_of("ENTRYPOINT") == ['["mambatrain"]']


def test_what_it_copies_exists_and_docker_sees_it() -> None:
    seen = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [source for text in texts_of("COPY") for source in shlex.split(text)[:-1]]
    assert sources
    for source in sources:
        assert (REPOSITORY / source).exists()
        assert f"!{source}" in seen


def test_it_has_what_the_kernels_for_cpus_are_built_of() -> None:
    names = [name for name, _ in instructions()]
    texts = [text for _, text in instructions()]
    installs = next(index for index, text in enumerate(texts) if "pip install" in text)
    assert " g++ " in texts_of("RUN")[0]
    copied = [source for index in range(installs) if names[index] == "COPY" for source in texts[index].split()[:-1]]
    assert {"setup.py", "kernels", "mambatrain"} <= set(copied)


def test_every_command_is_of_a_kind_that_is_known_here() -> None:
    kinds = [re.sub(r"^/opt/mambatrain/bin/", "", text).split()[0] for text in texts_of("RUN")]
    assert kinds == ["apt-get", "python3", "pip", "useradd", "mambatrain"]
    assert "-c /src/constraints.txt" in texts_of("RUN")[2]


@pytest.mark.skipif(not INSTALLS, reason="installing needs the package registry: MAMBATRAIN_TEST_INSTALL=1 allows it")
def test_its_python_commands_install_a_working_package(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    for text in texts_of("RUN")[1:3]:
        command = text.replace("/opt/", f"{tmp_path}/opt/").replace("/src", f"{tmp_path}/src")
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    binaries = tmp_path / "opt/mambatrain/bin"
    listed = subprocess.run(
        [binaries / "mambatrain", "recipes", "list"], cwd=tmp_path / "opt", capture_output=True, text=True, check=False
    )
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "mamba2-2.7b" in listed.stdout
    assert list((tmp_path / "opt").glob("**/mambatrain/_kernels/lib/*.so")), "the kernels were not compiled"
    frozen = subprocess.run([binaries / "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").lower().splitlines()
    for line in frozen.lower().splitlines():
        if "==" in line:
            assert line.split("+")[0] in constraints, f"{line} is not the version that was tested"
