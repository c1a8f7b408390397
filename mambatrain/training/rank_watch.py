"""Ranks wait for one another; when one hangs, the others say which and end.

The loop notes what it is about to do. A thread of each rank tells the process group's store, a score of times within
the limit, where its rank is, and reads where the others are while its own stands still. When none of them has moved for
the limit, the rank that is behind is named and every rank ends: the newest checkpoint is whole.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch

from mambatrain.launch import EXIT_OTHERS_FAILED

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

TICKS_IN_LIMIT = 20  # time is counted in ticks, not read off a clock: a job that was frozen as a whole has not hung
MAX_NAMED = 8  # ranks in a message
_WITHOUT_END = timedelta(days=365)


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    meetings: int = 0
    """Moments it has come to at which all ranks wait for one another; as many on ranks that are level."""
    moves: int = 0
    """Things it has begun since the last of these."""
    draw: int = 0
    doing: str = "setting up"
    patient: bool = True
    """Whether what it does may take any time (tokenizing conversations): it moves as long as the process lives."""


@dataclass(frozen=True)
class Seen:
    """What a rank tells of itself."""

    place: Place
    beats: int
    """Ticks of its watching thread; they stop with the whole process."""
    host: str
    pid: int


class RankWatch:
    """One rank's part. Of a lone process it only takes notes."""

    def __init__(self, rank: int, num_ranks: int, store: Store | None, limit_seconds: float) -> None:
        self.here = Place()  # replaced as a whole: another thread reads it
        self._rank, self._num_ranks, self._store, self._limit_seconds = rank, num_ranks, store, limit_seconds
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank watch", daemon=True)
        self._asking: threading.Thread | None = None

    def at(self, doing: str, draw: int) -> None:
        """Notes what this rank is about to do on its own."""
        self.here = Place(self.here.meetings, self.here.moves + 1, draw, doing, patient=False)

    def meet(self, doing: str, draw: int) -> None:
        """Notes that this rank is about to wait for all others; every rank comes to the same meetings."""
        self.here = Place(self.here.meetings + 1, 0, draw, doing, patient=False)

    def be_patient(self, doing: str, draw: int) -> None:
        """Notes that this rank is about to do something that may take any time."""
        self.here = Place(self.here.meetings, self.here.moves + 1, draw, doing, patient=True)

    def start(self) -> None:
        """Begins to watch, where there are others to be watched."""
        if self._store is not None:
            self._tell()
            self._thread.start()

    def stop(self) -> None:
        """Watches no more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(self._limit_seconds / TICKS_IN_LIMIT)  # no longer, should the store not answer

    def _watch(self) -> None:
        """Counts ticks in which no rank moved, and for each rank those in which its process gave no sign of life."""
        own, still = self.here, 0
        seen: list[Seen | None] = [None] * self._num_ranks
        silent = [0] * self._num_ranks
        while not self._ended.wait(self._limit_seconds / TICKS_IN_LIMIT):
            moved, own = self.here != own or self.here.patient, self.here
            answers = self._ask(read=not moved)
            if answers is None:  # the store's process is gone or stands still; this rank's own time still counts
                seen, silent = [None] * self._num_ranks, [0] * self._num_ranks
            else:
                moved = moved or [one and one.place for one in answers] != [one and one.place for one in seen]
                silent = [
                    count + 1 if one == before else 0 for count, one, before in zip(silent, answers, seen, strict=True)
                ]
                seen = answers
            still = 0 if moved else still + 1
            if still >= TICKS_IN_LIMIT:
                self._end(seen, [count >= TICKS_IN_LIMIT / 2 for count in silent])
                return

    def _ask(self, read: bool) -> list[Seen | None] | None:
        """`_exchange` within a tick, or None: a store whose process is stopped neither answers nor fails."""
        answers: list[list[Seen | None] | None] = []
        if self._store_answers():
            self._asking = threading.Thread(target=lambda: answers.append(self._exchange(read)), daemon=True)
            self._asking.start()
            self._asking.join(self._limit_seconds / TICKS_IN_LIMIT)
        return answers[0] if answers else None

    def _store_answers(self) -> bool:
        return self._asking is None or not self._asking.is_alive()

    def _exchange(self, read: bool) -> list[Seen | None] | None:
        """Tells the others where this rank is and, where asked to, reads where they are; None: nobody answers."""
        try:
            self._tell()
            return [self._read(rank) for rank in range(self._num_ranks)] if read else [None] * self._num_ranks
        except RuntimeError:  # what torch raises of a connection that is lost
            return None

    def _tell(self) -> None:
        self._beats += 1
        here = self.here  # the main thread alone writes it: a note must not be lost
        place = asdict(here) | {"moves": here.moves + (self._beats if here.patient else 0)}
        told = {"place": place, "beats": self._beats, "host": socket.gethostname(), "pid": os.getpid()}
        assert self._store is not None
        self._store.set(f"rank-watch/{self._rank}", json.dumps(told))

    def _read(self, rank: int) -> Seen | None:
        key = f"rank-watch/{rank}"
        assert self._store is not None
        if not self._store.check([key]):
            return None
        told = json.loads(self._store.get(key))
        return Seen(Place(**told.pop("place")), **told)

    def _end(self, seen: Sequence[Seen | None], silent: Sequence[bool]) -> None:
        try:
            # Where nobody answers, each rank speaks for itself.
            asks = self._store is not None and self._store_answers()
            is_first = not asks or cast("Store", self._store).add("rank-watch/said", 1) == 1
        except RuntimeError:
            is_first = True
        if is_first:
            print(f"\nerror: {describe_hang(seen, silent, self._limit_seconds)}", file=sys.stderr)
            print(
                "\nhint: the newest checkpoint is whole, and the same command continues from it; where something takes "
                "that long by right, give a larger --rank-timeout",
                file=sys.stderr,
                flush=True,
            )
        os._exit(EXIT_OTHERS_FAILED)  # the main thread waits in a collective and hears nothing


def describe_hang(seen: Sequence[Seen | None], silent: Sequence[bool], limit_seconds: float) -> str:
    """Which ranks the others wait for.

    Args:
        seen: of each rank, what it told last; None where it told nothing.
        silent: of each rank, whether its whole process stands still.
        limit_seconds: for which none has moved.
    """
    waited = f"no process has moved for {limit_seconds:g} seconds"
    if not any(seen):
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        keeper = "the launcher" if by_launcher else f"process 0 of {len(seen)}"
        where = os.environ.get("MASTER_ADDR", "its host")
        return f"{waited}; {keeper} on {where}, through which they tell each other where they are, does not answer"
    places = {rank: one.place for rank, one in enumerate(seen) if one is not None}
    fewest = min((place.meetings, place.moves) for place in places.values())
    named = [rank for rank in range(len(seen)) if silent[rank] or rank not in places]
    named = named or [rank for rank, place in places.items() if (place.meetings, place.moves) == fewest]
    lines = []
    for rank in named[:MAX_NAMED]:
        one = seen[rank]
        if one is None:
            lines.append(f"  process {rank} of {len(seen)} has told nothing")
            continue
        sign = ", and gives no sign of life" if silent[rank] else ""
        where = f"on {one.host} (pid {one.pid})"
        lines.append(f"  process {rank} of {len(seen)} {where}: {one.place.doing}, draw {one.place.draw}{sign}")
    if len(named) > MAX_NAMED:
        lines.append(f"  and {len(named) - MAX_NAMED} more")
    if len(named) == len(seen):
        return f"{waited}, and none is behind the others:\n" + "\n".join(lines)
    return f"{waited}; the others wait for\n" + "\n".join(lines)


@contextmanager
def watching_ranks(rank: int, num_ranks: int, limit_seconds: float) -> Iterator[RankWatch]:
    """Watches from here on; what is not noted otherwise is setting up, which may take any time."""
    store = None
    if num_ranks > 1:
        from torch.distributed.distributed_c10d import _get_default_store

        wait_without_end()
        default: Any = _get_default_store()
        store = default.clone()  # of its own: the main thread may wait in the other
        store.set_timeout(timedelta(seconds=limit_seconds))
    watch = RankWatch(rank, num_ranks, store, limit_seconds)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()


def wait_without_end() -> None:
    """Takes the time limit off collectives of every group there is: the watch knows better who waits for whom.

    A rank may well wait for hours for another that evaluates or saves, and a collective's own limit names nobody.
    """
    from torch.distributed import distributed_c10d

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(_WITHOUT_END, group)
