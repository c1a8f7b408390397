"""What `doctor` says of one thing: how it is, and what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of `mambatrain doctor`."""

    subject: str
    status: Status
    """note: works, and could be better. problem: something that a command needs does not work."""
    value: str
    """What was found, a clause for people."""
    mend: str | None = None
    """The command that mends it; None where there is nothing to mend."""


def ok(subject: str, value: str) -> Finding:
    return Finding(subject, "ok", value)


def note(subject: str, value: str, mend: str | None = None) -> Finding:
    return Finding(subject, "note", value, mend)


def problem(subject: str, value: str, mend: str) -> Finding:
    return Finding(subject, "problem", value, mend)


REPORT = "report it with the versions above: it is a bug of mambatrain or of the package that it names"


def examine(subject: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of one look at the machine; a look that fails is a finding, never the end of the others."""
    try:
        return list(look())
    except Exception as error:  # whatever a broken installation raises is what the user came to learn
        reason = str(error).strip().splitlines()
        return [problem(subject, f"{type(error).__name__}: {reason[0] if reason else 'without a message'}", REPORT)]
