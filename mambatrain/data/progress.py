"""How far a long pass over bytes has come: a bar on a terminal, else a line every few seconds. Always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

BAR_INTERVAL_SECONDS = 0.1  # drawing costs more than most of the steps it tells of
LINE_INTERVAL_SECONDS = 5.0  # a log file wants a sign of life, not a bar


class ByteProgress:
    """Bytes done of a known total, with rate and estimated time of arrival.

    On a terminal a transient bar (rich); elsewhere silent for the first seconds, then a line at an interval.
    """

    def __init__(self, what: str, total_bytes: int, bytes_before: int = 0) -> None:
        self.what = what
        self.total_bytes = total_bytes
        self.bytes_before = bytes_before  # done by an earlier process: they say nothing about the rate
        self._bar = _open_bar(what, total_bytes) if sys.stderr.isatty() else None
        self._interval = LINE_INTERVAL_SECONDS if self._bar is None else BAR_INTERVAL_SECONDS
        self._started = self._last_shown = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance_to(self, num_bytes: int) -> None:
        """Says that `num_bytes` of the total are done."""
        now = time.monotonic()
        if now - self._last_shown < self._interval:
            return
        self._last_shown = now
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=num_bytes)
        else:
            seconds = now - self._started
            line = progress_line(self.what, num_bytes, self.total_bytes, seconds, self.bytes_before)
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def progress_line(what: str, num_bytes: int, total_bytes: int, seconds: float, bytes_before: int = 0) -> str:
    """`tokenizing: 12.3 of 45.6 MB, 5.4 MB/s, 0:06 left`."""
    rate = (num_bytes - bytes_before) / max(seconds, 1e-9)
    told = f"{what}: {num_bytes / 1e6:.1f} of {total_bytes / 1e6:.1f} MB"
    if rate <= 0:  # in the middle of the first document
        return told
    left = int((total_bytes - num_bytes) / rate)
    hours, minutes = divmod(left // 60, 60)
    clock = f"{hours}:{minutes:02d}:{left % 60:02d}" if hours else f"{minutes}:{left % 60:02d}"
    return f"{told}, {rate / 1e6:.1f} MB/s, {clock} left"


def _open_bar(what: str, total_bytes: int):  # type: ignore[no-untyped-def]  # rich is imported only for a terminal
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    bar.add_task(what, total=total_bytes)
    return bar
