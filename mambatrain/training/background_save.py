"""At most one checkpoint that is being written while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class BackgroundSave:
    """Copies of what is saved, in CPU memory that is used again, and the thread that writes them.

    The thread is a daemon: who leaves at once does not wait for it, and what it had written is no checkpoint yet.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.was_waited_for = False
        """Whether a save ever had to wait for the one before it."""

    @property
    def is_writing(self) -> bool:
        """Whether bytes are being written now."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether `finish` would raise."""
        return self._error is not None

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same values in CPU memory, pinned where they come from CUDA; valid until the next copy.

        Nothing may be being written.
        """
        copies = {name: self._buffer(name, tensor).copy_(tensor, non_blocking=True) for name, tensor in tensors.items()}
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies

    def start(self, write: Callable[[], None]) -> None:
        """Writes in a thread. `finish` comes first: one at a time."""

        def run() -> None:
            try:
                write()
            except BaseException as error:  # `finish` raises it where the run can end
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Waits, and raises what went wrong in the thread."""
        self.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        held = self._copies.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name] = held
        return held
