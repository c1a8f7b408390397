"""`mambatrain doctor`: what works on this machine, and the command that mends what does not."""

from __future__ import annotations

from collections.abc import Iterable

from mambatrain.planning.findings import Finding, examine
from mambatrain.planning.machine import (
    begin_looking_at_hub,
    look_at_disk,
    look_at_memory,
    look_at_port,
    look_at_torch,
    look_at_wandb,
)
from mambatrain.planning.software import look_at_packages, look_at_python


def examine_machine() -> list[Finding]:
    """Every finding, in the order a reader wants them; nothing here raises, nothing is written or installed."""
    look_at_hub = begin_looking_at_hub()
    looks = {
        "python": look_at_python,
        "packages": look_at_packages,
        "torch": look_at_torch,
        "memory": look_at_memory,
        "disk": look_at_disk,
        "kernels": _look_at_kernels,
        "rendezvous": look_at_port,
        "hub": look_at_hub,
        "wandb": look_at_wandb,
    }
    return [finding for subject, look in looks.items() for finding in examine(subject, look)]


def _look_at_kernels() -> Iterable[Finding]:
    """Imported late: where torch is broken the other findings are still made."""
    from mambatrain.planning.kernels import look_at_kernels

    return look_at_kernels()
