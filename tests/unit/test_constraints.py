"""constraints.txt and the ranges of pyproject.toml agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]


def pinned_versions() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_each_requirement_is_pinned_within_its_range() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = pinned_versions()
    for text in [*project["dependencies"], *extras["dev"], *extras["eval"]]:
        requirement = Requirement(text)
        if requirement.name.startswith(("cuda-", "nvidia-", "triton")):
            # the CUDA build of torch asks for versions of its own, which no pin may contradict
            assert canonicalize_name(requirement.name) not in pins
            continue
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned"
        assert version in requirement.specifier, f"{requirement.name} {version} is outside {requirement.specifier}"


def test_no_pin_asks_for_one_index_or_one_build() -> None:
    """`torch==2.13.0+cpu` exists on one index alone; `==2.13.0` takes whichever build an index has."""
    pins = pinned_versions()
    assert pins["torch"] == "2.13.0"
    assert [name for name, version in pins.items() if re.search(r"[+@/]", version)] == []
    assert "mambatrain" not in pins
