"""What a machine has for training: processors, memory, disk, a free port, the hub, Weights & Biases."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

from mambatrain.planning.findings import Finding, note, ok, problem

HUB = "https://huggingface.co"
HUB_SECONDS = 3.0
RENDEZVOUS_PORT = 29500  # torchrun's own, where several machines meet
LITTLE_DISK_BYTES = 10 * 2**30  # a few checkpoints of a small model, and its tokens
LITTLE_MEMORY_BYTES = 4 * 2**30  # torch, the data pipeline and the demo take about one


def look_at_torch() -> Iterable[Finding]:
    """torch's build and what it sees: CUDA devices, driver, NCCL."""
    import torch

    driver = _nvidia_driver()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    yield ok("torch build", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
            name = f"{torch.cuda.get_device_name(index)}, compute capability {capability}"
            yield ok(f"cuda:{index}", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
        yield ok("driver", driver or "of another maker than NVIDIA")
        if torch.distributed.is_nccl_available():
            version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
            yield ok("nccl", ".".join(map(str, version)))
        else:
            yield note("nccl", "not in this torch: --gpus 2 and more need it", "pip install --force-reinstall torch")
    elif driver is None:
        yield ok("cuda", "no NVIDIA driver on this machine: training runs on the CPU")
    elif torch.version.cuda is None:
        found = f"there is a GPU (driver {driver}), and this torch is built for CPUs"
        yield problem(
            "cuda", found, "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        )
    else:
        found = f"driver {driver} does not serve torch's CUDA {torch.version.cuda}"
        yield problem("cuda", found, "nvidia-smi; then update the driver, or install a torch of an older CUDA")


def look_at_memory() -> Iterable[Finding]:
    """Processors and main memory."""
    import psutil

    yield ok("processor", f"{platform.machine()}, {os.cpu_count()} cores")
    memory = psutil.virtual_memory()
    found = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    if memory.available < LITTLE_MEMORY_BYTES:
        yield note("memory", found, "ps aux --sort=-rss | head")
    else:
        yield ok("memory", found)


def look_at_disk() -> Iterable[Finding]:
    """The disk of the working folder, where runs go by default."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    found = f"{free / 2**30:.1f} GiB free at {here}"
    if not os.access(here, os.W_OK):
        yield note("disk", f"{here} cannot be written", "mambatrain pretrain RECIPE --run DIR  # elsewhere")
    elif free < LITTLE_DISK_BYTES:
        yield note("disk", found, "du -sh runs/* data/*")
    else:
        yield ok("disk", found)


def look_at_port() -> Iterable[Finding]:
    """Whether torchrun's port is free; one machine alone takes any free one."""
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torchrun does: a port just left is free
        try:
            own.bind(("127.0.0.1", RENDEZVOUS_PORT))
        except OSError as error:
            found = f"{RENDEZVOUS_PORT} cannot be used: {error.strerror}; several machines would meet there"
            yield note("rendezvous", found, f"torchrun --rdzv-endpoint HOST:{RENDEZVOUS_PORT + 1} ...")
        else:
            yield ok("rendezvous", f"port {RENDEZVOUS_PORT} is free")


def look_at_wandb() -> Iterable[Finding]:
    """What `--tracker wandb` would do; reads the key's place, not the key."""
    from importlib.util import find_spec

    if find_spec("wandb") is None:
        yield note("wandb", "not installed: --tracker wandb needs it", "pip install wandb")
        return
    mode = os.environ.get("WANDB_MODE")
    if mode:
        yield ok("wandb", f"WANDB_MODE={mode}")
    elif os.environ.get("WANDB_API_KEY") or _netrc_names("api.wandb.ai"):
        yield ok("wandb", "a key is configured: --tracker wandb logs online")
    else:
        yield note("wandb", "no key: --tracker wandb logs into the run folder alone", "wandb login")


def begin_looking_at_hub() -> Callable[[], Iterable[Finding]]:
    """Asks the hub in the background; the result waits for the answer no longer than HUB_SECONDS."""
    answers: list[Finding] = []
    thread = threading.Thread(target=lambda: answers.append(_ask_hub()), daemon=True)
    thread.start()

    def look() -> Iterable[Finding]:
        thread.join(HUB_SECONDS + 0.5)  # looking a name up has no time limit of its own
        yield from answers or [_unreachable("no answer")]

    return look


def _ask_hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return note("hub", "HF_HUB_OFFLINE is set: only what was fetched before is found", "unset HF_HUB_OFFLINE")
    address = os.environ.get("HF_ENDPOINT", HUB)
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS):
            return ok("hub", f"{address} answers")
    except urllib.error.HTTPError as error:
        return ok("hub", f"{address} answers ({error.code})")
    except (OSError, ValueError) as error:
        return _unreachable(str(getattr(error, "reason", error)))


def _unreachable(reason: str) -> Finding:
    address = os.environ.get("HF_ENDPOINT", HUB)
    return note("hub", f"{address} cannot be reached ({reason}); all but hub names works", f"curl -I {address}")


def _nvidia_driver() -> str | None:
    """The NVIDIA driver's version, None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n", maxsplit=1)[0].strip() or None


def _netrc_names(host: str) -> bool:
    """Whether ~/.netrc, where `wandb login` keeps it, has an entry for a host."""
    from netrc import NetrcParseError, netrc

    try:
        return host in netrc(os.environ.get("NETRC")).hosts
    except (OSError, NetrcParseError):
        return False
