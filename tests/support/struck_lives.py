"""Lives of a run, forked and struck down: several ranks each, at a moment that is chosen by what a rank is doing.

A life is one fork a rank of a process that has imported everything and computed nothing, so that it costs no start-up.
Each rank tells in shared memory what it does (what the rank watch is told); the parent waits for that, stops all ranks,
notes where they are, and strikes. As torchrun does, it asks the others to end when one is gone.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import accelerate  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import safetensors.torch  # noqa: F401
import torch
import torch._dynamo  # which every optimizer imports
import torch.distributed.checkpoint.hf_storage
import torch.distributed.checkpoint.state_dict_loader
import torch.distributed.checkpoint.state_dict_saver
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.nn.parallel

import mambatrain.ops.backends  # noqa: F401
from mambatrain.devices import end_processes
from mambatrain.recipe import read_recipe
from mambatrain.training.assemble import Where
from mambatrain.training.rank_watch import RankWatch
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

SECONDS_TO_END = 10.0  # for ranks that lost one; those that do not are killed, as torchrun does after 30, and counted
SECONDS_TO_JOIN = 3.0  # the same for ranks that wait for one that died before they came together
PHASES = ("start", "step", "evaluation", "save", "end")


@dataclass(frozen=True)
class Mode:
    """How many ranks, how many of them share one copy of the model, and how many each row."""

    ranks: int
    shard: str = "no"
    sequence: int = 1


@dataclass(frozen=True)
class Strike:
    """What befalls a life, and when."""

    kind: str
    """`all` or `one` by SIGKILL, `ask all` or `ask one` by SIGTERM, `hang` by SIGSTOP."""
    victim: int
    """The rank that is waited for, and that is struck where one is."""
    lines: int
    """Lines of the log that this life writes before."""
    phase: str
    delay: float
    """Seconds in the phase; often it ends before them."""


@dataclass
class Life:
    """How one went."""

    exit_codes: list[int] = field(default_factory=list)
    """Of each rank, as Python has them: -9 is SIGKILL."""
    struck_in: str | None = None
    """Where the victim was; None: the run had ended before."""
    stubborn: int = 0
    """Ranks that did not end in time when one was gone."""
    said: str = ""
    """By all ranks, on stderr."""
    seconds: float = 0.0


def phase_of(doing: str) -> str:
    """In which part of a life that lies which the rank watch is told."""
    if doing == "setting up":
        return "start"
    if "held-out" in doing:
        return "evaluation"
    if "saving" in doing or "checkpoint" in doing:
        return "save"
    return "end" if doing == "ending" else "step"


def tell_phases(slots: mmap.mmap, rank: int) -> None:
    """From here on the parent sees what this rank notes."""

    def telling(note: Callable[[RankWatch, str, int], None]) -> Callable[[RankWatch, str, int], None]:
        def noted(self: RankWatch, doing: str, draw: int) -> None:
            note(self, doing, draw)
            slots[rank] = PHASES.index(phase_of(doing))

        return noted

    for name in ("at", "meet", "be_patient"):
        setattr(RankWatch, name, telling(getattr(RankWatch, name)))


def live(recipe: Path, run: Path, kernels: str, mode: Mode, rank: int, port: int, rank_timeout: float) -> int:
    """One rank of a life, from the start of the command on; its exit code."""
    torch.set_num_threads(1)
    if mode.ranks > 1:
        group = {"RANK": rank, "WORLD_SIZE": mode.ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": mode.ranks}
        os.environ.update({name: str(value) for name, value in group.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    place = {"shard": mode.shard, "sequence": mode.sequence}
    where = Where(device="cpu", kernels=kernels, rank_timeout=rank_timeout, **place)  # type: ignore[arg-type]
    with StopRequest() as stop:
        exit_code = run_training(read_recipe(str(recipe)), run, where, "if-possible", stop)
        end_processes()
    return exit_code


def run_life(
    recipe: Path, run: Path, kernels: str, mode: Mode, strike: Strike | None, rank_timeout: float = 600.0
) -> Life:
    """One life, struck or left alone until the run is done."""
    assert len(list(Path("/proc/self/task").iterdir())) == 1, (
        "threads do not outlive a fork, what they hold locked does"
    )
    slots, port, began = mmap.mmap(-1, mode.ranks), free_port(), time.monotonic()
    run.mkdir(parents=True, exist_ok=True)
    files = [run.parent / f"{run.name}.rank-{rank}.txt" for rank in range(mode.ranks)]
    pids = []
    for rank in range(mode.ranks):
        pid = os.fork()
        if pid == 0:
            end_as_a_process_does(files[rank], slots, recipe, run, kernels, mode, rank, port, rank_timeout)
        pids.append(pid)
    life = Life()
    if strike is not None:
        saves = SavesOf(run)
        wait_for_moment(run / "log.jsonl", pids, slots, strike, saves)
        life.struck_in = strike_down(pids, slots, strike, saves)
    joining = strike is not None and (strike.kind == "hang" or life.struck_in == "start")
    life.exit_codes, life.stubborn = wait_for_end(pids, SECONDS_TO_JOIN if joining else SECONDS_TO_END)
    life.said = "".join(file.read_text(errors="replace") for file in files)
    life.seconds = time.monotonic() - began
    return life


class SavesOf:
    """Whether a life is writing a checkpoint, in the background, too; what earlier ones have left does not count."""

    def __init__(self, run: Path) -> None:
        self._folder, self._began = run / "checkpoints", time.time_ns()

    def are_going_on(self) -> bool:
        try:
            return any(path.stat().st_mtime_ns > self._began for path in self._folder.glob(".writing-*"))
        except FileNotFoundError:  # it has just got its name
            return True


def end_as_a_process_does(file: Path, slots: mmap.mmap, *arguments: object) -> None:
    """Never returns: what follows in the fork is the parent's."""
    exit_code = 1
    try:
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        tell_phases(slots, int(str(arguments[4])))
        exit_code = live(*arguments)  # type: ignore[arg-type]
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(exit_code)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def num_lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_moment(log: Path, pids: list[int], slots: mmap.mmap, strike: Strike, saves: SavesOf) -> None:
    """Until the life has written its lines (a resumed one cuts the log before) and the victim is in the phase."""
    fewest = num_lines(log)
    while not any(map(has_ended, pids)):
        now = num_lines(log)
        fewest = min(fewest, now)
        if strike.phase == "start" or now >= fewest + strike.lines:
            break
        time.sleep(0.002)
    while not any(map(has_ended, pids)) and slots[strike.victim] != PHASES.index(strike.phase):
        if strike.phase == "save" and saves.are_going_on():
            break
        time.sleep(0.0003)
    time.sleep(strike.delay)


def strike_down(pids: list[int], slots: mmap.mmap, strike: Strike, saves: SavesOf) -> str | None:
    """Strikes, and says where the victim was; None where the life had ended."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # one that has ended waits for its parent: its pid is its own
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    struck_in = "save" if saves.are_going_on() else PHASES[slots[strike.victim]]
    if has_ended(pids[strike.victim]):
        struck_in = None
    struck = pids if strike.kind in {"all", "ask all"} else [pids[strike.victim]]
    for pid in pids:
        if pid in struck and strike.kind in {"all", "one"}:
            os.kill(pid, signal.SIGKILL)
        elif pid in struck and strike.kind.startswith("ask"):
            os.kill(pid, signal.SIGTERM)
        if not (pid in struck and strike.kind == "hang"):
            os.kill(pid, signal.SIGCONT)
    return struck_in


def wait_for_end(pids: list[int], seconds: float) -> tuple[list[int], int]:
    """Exit codes by rank, and how many ranks had to be killed when one was gone."""
    ends: dict[int, int] = {}
    deadline, stubborn = None, 0
    while len(ends) < len(pids):
        for pid in pids:
            if pid not in ends and has_ended(pid):
                _, status = os.waitpid(pid, 0)
                ends[pid] = os.waitstatus_to_exitcode(status)
        if deadline is None and any(code not in {0, 75} for code in ends.values()):
            deadline = time.monotonic() + seconds
            for pid in set(pids) - ends.keys():
                os.kill(pid, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            for pid in set(pids) - ends.keys():
                os.kill(pid, signal.SIGKILL)
                stubborn += 1
            deadline = float("inf")
        time.sleep(0.005)
    return [ends[pid] for pid in pids], stubborn


def draw_strike(rng: random.Random, mode: Mode, hang: bool) -> Strike:
    """At random; half of the strikes fall into saves and evaluations, which are short."""
    alone = ["all", "all", "all", "ask all"]
    kind = rng.choice(alone if mode.ranks == 1 else ["one", "one", "one", *alone, "ask one"])
    phase = rng.choices(("start", "step", "evaluation", "save"), (1, 4, 2, 4))[0]
    return Strike(
        kind="hang" if hang and mode.ranks > 1 else kind,
        victim=rng.randrange(mode.ranks),
        lines=rng.randint(0, 6),
        phase="step" if hang and phase == "start" else phase,
        delay=rng.uniform(0.0, 1.5) if phase == "start" else rng.choice((0.0, 0.0005, 0.002, 0.01)),
    )
