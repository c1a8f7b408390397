"""One process per device through torchrun, and exit codes that mean something.

torchrun turns every worker's exit code into 1. So a run that was asked to stop leaves a marker file in its folder and
its workers exit with 0; `launch_workers` turns the marker into exit code 75.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: stopped as asked, and resumable
EXIT_OTHERS_FAILED = 76  # of a worker that ends because another one hangs or is gone; the launcher makes it 1
RANK_TIMEOUT_SECONDS = 1800.0
WORKER_VARIABLE = "MAMBATRAIN_WORKER"
_SIGNALS_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def is_worker() -> bool:
    """Whether a launcher (ours, torchrun, accelerate launch) started this process as one of several."""
    return "RANK" in os.environ or WORKER_VARIABLE in os.environ


def rank_of_process() -> int:
    """This process's rank, 0 when it is alone."""
    return int(os.environ.get("RANK", "0"))


def num_processes_expected() -> int:
    """How many processes the launcher of this one started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_processes_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def launch_workers(
    arguments: list[str], num_processes: int, stopped_marker: Path, num_nodes: int = 1, rendezvous: str | None = None
) -> int:
    """Runs `mambatrain ARGUMENTS` in processes of this machine and returns the exit code for the shell.

    With several nodes the same is called on each; they meet at `rendezvous`, HOST:PORT of one of them.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 to this process are handed to the workers as SIGTERM, which asks them to save
    and stop; they run in a session of their own, so that a terminal's Ctrl-C reaches them through here alone. The
    second signal ends them as they are: a worker that waits for another one would not hear a second request.
    """
    import psutil

    environment = dict(os.environ)
    environment[WORKER_VARIABLE] = "1"
    environment["PYTHONSAFEPATH"] = "1"  # `-m` would put the working folder, which may hold `kernels/`, first
    # torchrun would give every process one thread.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    meeting = ["--standalone"]
    if num_nodes > 1:
        meeting = [f"--nnodes={num_nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}"]
    command = [sys.executable, "-m", "mambatrain.launch", f"--nproc-per-node={num_processes}", *meeting]
    torchrun: list[subprocess.Popen[bytes]] = []
    asked, nobody_there = 0, False

    def pass_on(signal_number: int, frame: FrameType | None) -> None:
        nonlocal asked, nobody_there
        asked += 1
        for process in torchrun:
            with suppress(psutil.NoSuchProcess):
                workers = psutil.Process(process.pid).children()
                nobody_there = nobody_there or not workers
                for worker in workers or [process]:
                    worker.send_signal(signal.SIGTERM if asked == 1 else signal.SIGKILL)

    previous = {number: signal.signal(number, pass_on) for number in _SIGNALS_PASSED_ON}
    try:
        worker_command = [*command, "-m", "--", "mambatrain", *arguments]
        torchrun.append(subprocess.Popen(worker_command, env=environment, start_new_session=True))
        if asked:  # in the moment before
            nobody_there = True
            torchrun[0].terminate()
        exit_code = torchrun[0].wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if asked > 1:
        print("left at once; the newest checkpoint is whole", file=sys.stderr)
        return EXIT_INTERRUPTED
    if nobody_there and exit_code != 0:
        print("left while no process of the run was there", file=sys.stderr)
        return EXIT_INTERRUPTED
    if exit_code != 0:
        return 1
    return EXIT_STOPPED if stopped_marker.is_file() else 0


def _run_torchrun() -> None:
    """torchrun without its page of traceback when a worker fails: the worker has said why."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main

    try:
        main(sys.argv[1:])
    except ChildFailedError as error:
        if said := describe_failures({rank: failure.exitcode for rank, failure in error.failures.items()}):
            print(f"error: {said}; the others were stopped", file=sys.stderr)
        sys.exit(1)
    except RendezvousError as error:
        print(f"error: the nodes did not meet: {type(error).__name__} {error}".rstrip(), file=sys.stderr)
        print(
            "\nhint: every node runs the same command, and --rendezvous names one that all can reach", file=sys.stderr
        )
        sys.exit(1)


def describe_failures(exit_codes: dict[int, int]) -> str:
    """Which processes ended first, and how; empty where those that ended have said of which other ones they waited.

    Args:
        exit_codes: of the failed processes by rank, as Python has them: -9 is SIGKILL.
    """
    told = {rank: code for rank, code in exit_codes.items() if code != EXIT_OTHERS_FAILED}
    first = {rank: code for rank, code in told.items() if code != -signal.SIGTERM}  # which torchrun sends the rest
    killed = {rank: code for rank, code in first.items() if code < 0}
    named = killed or first or told
    parts = []
    for rank, code in sorted(named.items()):
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        parts.append(f"process {rank} on {socket.gethostname()} {how}")
    return ", ".join(parts)


if __name__ == "__main__":
    _run_torchrun()
