"""A run folder: its files, who is using it, and the log.

RUN/recipe.yaml        the recipe with every setting spelled out
RUN/run.json           where it ran: backend, precision, devices, versions, data digest
RUN/tokenizer.json     the tokenizer of its data; beside it chat_template.jinja and tokenizer_config.json, of chats
RUN/chats/             the conversations it is trained on, in tokens
RUN/branched_from.json of a branch: the checkpoint it began with, and the settings that are others since
RUN/log.jsonl          one JSON object a line: a step, or a held-out evaluation
RUN/checkpoints/       step-00000100/, ...
RUN/loss.png           drawn from log.jsonl
RUN/adapter/           the adapter in PEFT's format, where the run trained one
RUN/tuned.state.safetensors   the initial state, where the run trained that
RUN/stopped            exists while a run that was asked to stop waits to be resumed
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from mambatrain.errors import UserError

# `runs list` looks at a lock by taking it for a moment: a run that begins just then must not think it is in use.
SECONDS_OF_A_GLANCE = 1.0


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ranks_lock = path / ".lock-ranks"
        self.recipe_file = path / "recipe.yaml"
        self.facts_file = path / "run.json"
        self.tokenizer_file = path / "tokenizer.json"
        self.chat_files = path / "chat_template.jinja", path / "tokenizer_config.json"
        self.chats = path / "chats"
        self.branch_file = path / "branched_from.json"
        self.log_file = path / "log.jsonl"
        self.checkpoints = path / "checkpoints"
        self.loss_picture = path / "loss.png"
        self.stopped_marker = path / "stopped"
        self.adapter = path / "adapter"
        self.tuned_state = path / "tuned.state.safetensors"

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.recipe_file.is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for a launch, by its rank 0; the lock dies with that, however it dies.

        Raises:
            UserError: another launch holds it, or ranks of one are left whose rank 0 is gone.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".lock").touch()
        except OSError as error:
            raise UserError(
                f"the run folder {self.path} cannot be used: {error.strerror}", "give another --run folder"
            ) from None
        with (self.path / ".lock").open("a+") as lock:
            if not _lock_within(lock, fcntl.LOCK_EX, SECONDS_OF_A_GLANCE):
                self._refuse(lock)
            if self._ranks_lock.exists():
                with self._ranks_lock.open("a+") as ranks:
                    if not _lock_within(ranks, fcntl.LOCK_EX, SECONDS_OF_A_GLANCE):
                        self._refuse(ranks)
                    ranks.truncate(0)
            lock.truncate(0)
            _sign(lock)
            yield

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Holds the folder by one of the other ranks, once all have met: it may outlive rank 0 and still write."""
        with self._ranks_lock.open("a+") as lock:
            if not _lock_within(lock, fcntl.LOCK_SH, SECONDS_OF_A_GLANCE):
                self._refuse(lock)
            _sign(lock)
            yield

    def _refuse(self, lock: IO[str]) -> NoReturn:
        lock.seek(0)
        holders = ", ".join(lock.read().split("\n")[:-1]) or "unknown"
        raise UserError(
            f"{self.path} is in use by another process ({holders})",
            "wait for it, stop it, or give another --run folder",
        )

    def is_running(self) -> bool:
        """Whether a process holds the folder now."""
        try:
            with (self.path / ".lock").open() as lock:
                return not _lock_within(lock, fcntl.LOCK_SH, 0.0)
        except OSError:  # no lock file, or one of another user's
            return False


def _sign(lock: IO[str]) -> None:
    with suppress(OSError):  # of a full disk; the first file of the run says it
        os.write(lock.fileno(), f"pid {os.getpid()} on {socket.gethostname()}\n".encode())


def _lock_within(lock: IO[str], kind: int, seconds: float) -> bool:
    """Whether the lock was taken; it goes when the file is closed."""
    last_try = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= last_try:
                return False
            time.sleep(0.02)
        else:
            return True


class RunLog:
    """log.jsonl: appended a whole line at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        # A full disk fails here once more, over the error that says so already; every whole line was flushed before.
        with suppress(OSError):
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log up to the first that is none: a crash cuts the last one short."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        if (line := _line_of_log(text)) is None:
            break
        lines.append(line)
    return lines


def _line_of_log(text: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        line = json.loads(text)
        if isinstance(line, dict) and isinstance(line.get("event"), str):
            return line
    return None


def read_log_end(path: Path, events: frozenset[str]) -> dict[str, dict[str, Any]]:
    """The last line of each event, read from the end of the file: a long log costs no more than a short one."""
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = {}
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        num_bytes = 1 << 20
        while not events <= found.keys():
            file.seek(max(0, size - num_bytes))
            found = {}
            for text in reversed(file.read(num_bytes).splitlines()):
                if (line := _line_of_log(text)) is not None:  # the first may be cut by us, the last by a crash
                    found.setdefault(line["event"], line)
            if num_bytes >= size:
                break
            num_bytes *= 8
    return {event: line for event, line in found.items() if event in events}


def cut_log(path: Path, num_lines: int) -> None:
    """Keeps the first lines: what a resumed run will write again goes.

    Raises:
        UserError: the log is shorter than the checkpoint says it was.
    """
    if not path.is_file() and num_lines == 0:
        return
    kept = path.read_bytes().splitlines(keepends=True)[:num_lines] if path.is_file() else []
    if len(kept) < num_lines:
        raise UserError(
            f"{path} has {len(kept)} lines where the checkpoint counts {num_lines}",
            "restore the log, or start again with --fresh",
        )
    os.truncate(path, sum(map(len, kept)))
