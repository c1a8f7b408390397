from __future__ import annotations

import io

import pytest

from mambatrain.data import progress as module
from mambatrain.data.progress import ByteProgress, progress_line


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_log_gets_a_line_at_an_interval_and_none_for_short_work(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ByteProgress("tokenizing", 100_000_000) as progress:
        for second in range(1, 13):
            clock.now = 100.0 + second
            progress.advance_to(second * 1_000_000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "tokenizing: 5.0 of 100.0 MB, 1.0 MB/s, 1:35 left",
        "tokenizing: 10.0 of 100.0 MB, 1.0 MB/s, 1:30 left",
    ]


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with ByteProgress("tokenizing", 1000) as progress:
        progress._last_shown = 0.0
        progress.advance_to(500)
    assert "tokenizing" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is cleared


@pytest.mark.parametrize(
    ("done", "seconds", "line"),
    [
        (0, 0.0, "x: 0.0 of 50.0 MB"),
        (50_000_000, 4.0, "x: 50.0 of 50.0 MB, 12.5 MB/s, 0:00 left"),
        (10_000, 36.0, "x: 0.0 of 50.0 MB, 0.0 MB/s, 49:59:24 left"),
    ],
)
def test_the_line_tells_the_time_that_is_left(done: int, seconds: float, line: str) -> None:
    assert progress_line("x", done, 50_000_000, seconds) == line
