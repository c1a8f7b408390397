"""What every test stands on: no network, one marker a folder, commands run as a user runs them.

unit/ mirrors the package; parity/ numbers against an independent truth; cli/ commands; distributed/ several processes;
fault/ kills, broken files, full disks; gpu/ only what a CPU cannot show.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
FOLDERS = ("unit", "parity", "cli", "distributed", "fault", "gpu")
MAX_THREADS = 2  # more gains nothing on tests this small, and another number of threads may round sums differently

# Before anything imports these packages; commands that tests start inherit it.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_MODE="offline")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it
if importlib.util.find_spec("hypothesis"):  # tests/gpu does without
    import hypothesis

    # The same examples in every run; a busy machine is no failure.
    hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("suite")
for variable in ("WANDB_API_KEY", "MPLBACKEND"):
    os.environ.pop(variable, None)


def pytest_configure(config: pytest.Config) -> None:
    for folder in FOLDERS:
        config.addinivalue_line("markers", f"{folder}: tests/{folder}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(item.path.relative_to(TESTS).parts[0])
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_cuda():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    if "torch" in sys.modules:  # a test module has imported it; those that start commands do without
        sys.modules["torch"].set_num_threads(min(MAX_THREADS, os.cpu_count() or 1))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = {
        outcome: len(terminalreporter.getreports(outcome)) for outcome in ("passed", "failed", "error", "skipped")
    }
    tests = [one for one in terminalreporter.getreports("skipped") if isinstance(one, pytest.TestReport)]  # not files
    gpu_skipped = [report for report in tests if "gpu" in report.keywords]
    line = f"{counts['passed']} tests passed, {counts['failed'] + counts['error']} failed, {counts['skipped']} skipped"
    if gpu_skipped:
        line += f"; {len(gpu_skipped)} GPU tests did not run: no CUDA device"
    terminalreporter.write_line(line)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Connections leave this machine in no test; processes of one test may talk over the loopback."""
    connect = socket.socket.connect

    def connect_nearby(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else ""  # else a Unix socket's path
        if host and host != "localhost" and not host.startswith("127.") and host != "::1":
            raise OSError(f"a test tried to connect to {address}: the network is off in tests")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_nearby)
        yield


@pytest.fixture
def run_mambatrain(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `mambatrain ARGUMENTS` in a process of its own, in tmp_path; gives returncode, stdout, stderr."""

    def run(
        *arguments: str | Path,
        cwd: Path = tmp_path,
        stdin: str = "",
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        dead_end = "http://127.0.0.1:9"  # the discard port: what asks for the network anyway is refused at once
        return subprocess.run(
            [Path(sys.executable).with_name("mambatrain"), *arguments],
            cwd=cwd,
            input=stdin,
            env={**os.environ, "HTTP_PROXY": dead_end, "HTTPS_PROXY": dead_end, **(environment or {})},
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )

    return run


# Of the standard library.
TINY_MODULES = (
    "bisect", "calendar", "cmd", "colorsys", "copy", "csv", "dis", "fnmatch", "glob", "heapq", "queue", "sched",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tokens: modules of the standard library, a vocabulary of 512, a fifth held out."""
    from mambatrain.data.manifest import TokenizeOptions, TokenizerSettings
    from mambatrain.data.tokenize_corpus import tokenize_corpus
    from mambatrain.data.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    library = Path(os.__file__).parent
    sources = [library / f"{name}.py" for name in TINY_MODULES]
    train_tokenizer(sources, folder / "tokenizer.json", TokenizerSettings(vocab_size=512, sample_bytes=1_000_000))
    tokenize_corpus(sources, folder / "tokenizer.json", folder / "shards", TokenizeOptions(held_out=0.2))
    return folder / "shards"


@pytest.fixture(scope="session")
def short_shards(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """The text and tokenizer of `tiny_shards` in documents of some hundred tokens, so that few are measured quickly."""
    from mambatrain.data.manifest import TokenizeOptions
    from mambatrain.data.tokenize_corpus import tokenize_corpus

    folder = tmp_path_factory.mktemp("short")
    texts = [(Path(os.__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in TINY_MODULES]
    documents = [text[start : start + 800] for text in texts for start in range(0, len(text), 800)]
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    (folder / "documents.jsonl").write_text(lines, encoding="utf-8")
    options = TokenizeOptions(held_out=0.2)
    tokenize_corpus([folder / "documents.jsonl"], tiny_shards / "tokenizer.json", folder / "shards", options)
    return folder / "shards"


@pytest.fixture
def write_tiny_recipe(tiny_shards: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of a model that trains in a second.

    `section__field=value` replaces a setting, `section=None` leaves a section out.
    """
    import yaml

    def write(**changes: Any) -> Path:
        content: dict[str, Any] = {
            "model": {"block": "mamba1", "d_model": 16, "num_layers": 2, "vocab_size": 512, "d_state": 8},
            "data": {"shards": str(tiny_shards), "row_tokens": 32, "seed": 3},
            "training": {"rows_per_step": 4, "total_steps": 12, "precision": "fp32"},
            "optimizer": {"learning_rate": 0.01},
            "evaluation": {"every_steps": 5, "max_tokens": 400},
            "checkpoint": {"every_steps": 4, "keep_newest": 2},
        }
        for path, value in changes.items():
            section, _, field = path.partition("__")
            if field:
                content[section][field] = value
            else:
                content[section] = value
        file = tmp_path / f"recipe-{len(list(tmp_path.iterdir()))}.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return file

    return write
