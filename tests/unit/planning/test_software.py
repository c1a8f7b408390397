"""Versions: the shipped table is constraints.txt's, and each way to differ has its status."""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mambatrain.planning import software
from mambatrain.planning.findings import Finding

REPOSITORY = Path(__file__).resolve().parents[3]


def findings() -> dict[str, Finding]:
    return {finding.subject: finding for finding in software.look_at_packages()}


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["eval"], *extras["8bit"]]
    names = [canonicalize_name(Requirement(text).name) for text in wanted]
    assert {name: pinned[name] for name in names} == software.TESTED_VERSIONS


def test_each_way_to_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {**software.TESTED_VERSIONS, "torch": "2.13.0+cpu", "rich": "14.1.0", "accelerate": "0.30.0"}
    del installed["wandb"], installed["lm-eval"], installed["torchao"]

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    found = findings()
    assert {name: finding.status for name, finding in found.items() if finding.status != "ok"} == {
        "rich": "note",
        "accelerate": "problem",
        "wandb": "problem",
        "lm-eval": "note",
        "torchao": "note",
    }
    assert found["torch"].value == "2.13.0+cpu"
    assert found["accelerate"].value == "0.30.0, outside of <2,>=1.10"
    assert found["rich"].mend == f"pip install 'rich=={software.TESTED_VERSIONS['rich']}'"
    assert all((finding.mend is None) == (finding.status == "ok") for finding in found.values())


def test_another_python_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "TESTED_PYTHON", (3, sys.version_info.minor))
    assert [finding.status for finding in software.look_at_python()] == ["ok", "ok"]
    monkeypatch.setattr(software, "TESTED_PYTHON", (3, sys.version_info.minor + 1))
    assert [finding.status for finding in software.look_at_python()] == ["ok", "note"]
