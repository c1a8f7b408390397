"""The installed packages against the ranges that mambatrain declares and the versions it was tested with."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib import metadata

import mambatrain
from mambatrain.planning.findings import Finding, note, ok, problem

# Those of constraints.txt, which a wheel does not carry; tests/unit/planning/test_software.py keeps them equal.
TESTED_PYTHON = (3, 11)
TESTED_VERSIONS = {
    "accelerate": "1.15.0",
    "backports-zstd": "1.8.0",
    "datasets": "5.2.0",
    "fsspec": "2026.9.0",
    "huggingface-hub": "2.4.0",
    "jinja2": "3.1.6",
    "lm-eval": "0.4.13",
    "matplotlib": "3.11.2",
    "numpy": "2.4.6",
    "psutil": "7.2.2",
    "pyarrow": "26.0.1",
    "pydantic": "2.14.3",
    "pyyaml": "6.0.3",
    "rich": "15.0.0",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.3",
    "torch": "2.13.0",
    "torchao": "0.18.0",
    "transformers": "5.23.0",
    "typer": "0.29.2",
    "wandb": "0.31.0",
}
OPTIONAL = {"lm-eval": "evaluate --tasks", "torchao": "optimizer.state_precision 8bit"}
"""Package -> what needs it."""


def look_at_python() -> Iterable[Finding]:
    """mambatrain's own version, and the interpreter."""
    yield ok("mambatrain", mambatrain.__version__)
    version, tested = platform.python_version(), ".".join(map(str, TESTED_PYTHON))
    found = f"{version} at {sys.executable}"
    if sys.version_info[:2] == TESTED_PYTHON:
        yield ok("python", found)
    else:
        yield note("python", f"{found}; tested with {tested}", f"python{tested} -m venv .venv")


def look_at_packages() -> Iterable[Finding]:
    """One finding for each dependency."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    declared = metadata.requires("mambatrain") or []
    ranges = {str(canonicalize_name(one.name)): str(one.specifier) for one in map(Requirement, declared)}
    for name, tested in TESTED_VERSIONS.items():
        yield _compare(name, tested, ranges.get(name, ""))


def _compare(name: str, tested: str, allowed: str) -> Finding:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    mend = f"pip install '{name}=={tested}'"
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        if name in OPTIONAL:
            return note(name, f"not installed: `{OPTIONAL[name]}` needs it", mend)
        return problem(name, "not installed", mend)
    if not SpecifierSet(allowed).contains(installed, prereleases=True):
        return problem(name, f"{installed}, outside of {allowed}", mend)
    if Version(installed).public != tested:
        return note(name, f"{installed}; tested with {tested}", mend)
    return ok(name, installed)
