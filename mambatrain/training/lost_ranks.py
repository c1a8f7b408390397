"""Ranks that are gone: a collective of the others fails at once."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from mambatrain.launch import EXIT_OTHERS_FAILED, num_processes_expected, rank_of_process

if TYPE_CHECKING:
    from mambatrain.training.stop import StopRequest

SECONDS_FOR_LAUNCHER = 5.0  # torchrun looks at its processes every tenth of a second
_LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo has no error class


@contextmanager
def explaining_lost_ranks(stop: StopRequest) -> Iterator[None]:
    """Ends this process, without a traceback, where a collective has lost the connection to another rank.

    The launcher sees which one is gone, says it, and ends the others; on other machines there is only this process to
    tell of it.
    """
    try:
        yield
    except RuntimeError as error:
        if num_processes_expected() == 1 or not is_lost_connection(error):
            raise
        stop.ends_anyway = True
        deadline = time.monotonic() + SECONDS_FOR_LAUNCHER
        while not stop.asked and time.monotonic() < deadline:
            time.sleep(0.05)
        if not stop.asked:
            rank = f"process {rank_of_process()} of {num_processes_expected()} on {socket.gethostname()}"
            print(f"\nerror: {rank} lost the connection to another one, which is gone", file=sys.stderr, flush=True)
        os._exit(EXIT_OTHERS_FAILED)  # threads of the process group would wait for the one that is gone


def is_lost_connection(error: Exception) -> bool:
    """Whether an error says that another rank is gone, in the words of gloo or of NCCL's own class of errors."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_CONNECTION)
