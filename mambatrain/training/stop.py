"""Being asked to stop: signals set a flag, the loop ends after the step in hand."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """While entered, SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 ask; the second time they end the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self.ends_anyway = False
        """Set where the process ends for another reason, and can promise nothing any more."""

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, signal_number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.ends_anyway:
            return
        name = signal.Signals(signal_number).name
        print(f"\n{name}: finishing this step and saving; once more to leave at once", file=sys.stderr)
