"""Who is named when no rank moves; ranks here are threads over one store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import HashStore

from mambatrain.training import rank_watch
from mambatrain.training.rank_watch import Place, RankWatch, Seen, describe_hang

LIMIT = 2.0  # seconds; what is asserted is who is named, never when


@pytest.fixture
def exit_codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    codes: list[int] = []
    monkeypatch.setattr(rank_watch.os, "_exit", codes.append)
    return codes


def wait_for(claim: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not claim():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_the_rank_that_is_behind_is_named_once_and_all_end(
    exit_codes: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    store = HashStore()
    watches = [RankWatch(rank, 3, store, LIMIT) for rank in range(3)]
    for watch in watches:
        watch.at("reading its rows", 7)
        watch.start()
    for watch in (watches[0], watches[2]):
        watch.meet("summing the loss", 7)
    wait_for(lambda: len(exit_codes) == 3)
    said = capfd.readouterr().err
    assert exit_codes == [76] * 3
    assert said.count("error: no process has moved for 2 seconds; the others wait for") == 1
    assert "process 1 of 3 on " in said
    assert "reading its rows, draw 7" in said
    assert "process 0" not in said
    assert "process 2" not in said


def test_while_one_rank_moves_none_hangs_and_patience_is_a_movement(
    exit_codes: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    store = HashStore()
    watches = [RankWatch(rank, 2, store, 1.0) for rank in range(2)]
    for watch in watches:
        watch.start()
    watches[0].meet("waiting for the checkpoint", 3)
    watches[1].be_patient("tokenizing", 3)
    time.sleep(4.0)  # four times the limit
    assert exit_codes == []
    watches[1].at("saving", 3)
    wait_for(lambda: len(exit_codes) == 2)
    assert "process 1 of 2" in capfd.readouterr().err


def test_a_process_without_a_sign_of_life_is_named_and_not_one_that_is_behind() -> None:
    behind, level = Place(3, 1, 9, "reading its rows", False), Place(4, 0, 9, "summing the loss", False)
    seen = [Seen(place, 5, "node-a", 100 + rank) for rank, place in enumerate([level, behind, level])]
    assert describe_hang(seen, [False, False, True], 30) == (
        "no process has moved for 30 seconds; the others wait for\n"
        "  process 2 of 3 on node-a (pid 102): summing the loss, draw 9, and gives no sign of life"
    )
    assert "process 1 of 3 on node-a (pid 101): reading its rows, draw 9" in describe_hang(seen, [False] * 3, 30)
    none_is_behind = describe_hang([seen[0], seen[2]], [False, False], 30)
    assert "none is behind the others:\n  process 0 of 2" in none_is_behind
    assert "process 0 of 2 has told nothing" in describe_hang([None, seen[0]], [False, False], 30)
    assert describe_hang([seen[1]] * 20, [True] * 20, 30).endswith("  and 12 more")


class LostStore(HashStore):
    """As a store whose process is gone."""

    def set(self, key: str, value: str) -> None:
        raise RuntimeError("Broken pipe")

    def add(self, key: str, value: int) -> int:
        raise RuntimeError("Broken pipe")


class SilentStore(HashStore):
    """As a store whose process is stopped: it never answers."""

    def set(self, key: str, value: str) -> None:
        threading.Event().wait(60)

    add = set  # type: ignore[assignment]


@pytest.mark.parametrize("store", [LostStore, SilentStore])
def test_without_the_launcher_a_rank_that_stands_still_ends_and_one_that_moves_does_not(
    exit_codes: list[int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    store: type[HashStore],
) -> None:
    watch = RankWatch(0, 2, HashStore(), 1.0)
    watch.start()
    watch._store = store()
    done = threading.Event()

    def move() -> None:
        while not done.wait(0.01):
            watch.at("computing gradients", 1)

    mover = threading.Thread(target=move)
    mover.start()
    time.sleep(2.5)
    assert exit_codes == []
    done.set()
    mover.join()
    wait_for(lambda: exit_codes == [76])
    assert "no process has moved for 1 seconds; process 0 of 2 on " in capfd.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert "; the launcher on " in describe_hang([None, None], [False, False], 1.0)


def test_a_lone_process_starts_no_thread() -> None:
    before = threading.active_count()
    with rank_watch.watching_ranks(0, 1, 1.0) as watch:
        watch.at("computing gradients", 1)
        watch.meet("summing the loss", 1)
        assert threading.active_count() == before
    assert (watch.here.meetings, watch.here.moves, watch.here.doing) == (1, 0, "summing the loss")
