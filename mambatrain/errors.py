"""The one exception that reaches a user without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: what happened, with the value, and a hint what to do.

    The command line prints ``error: MESSAGE``, a blank line, ``hint: HINT`` on stderr and exits with 1.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def nearest(name: str, known: list[str]) -> str | None:
    """The known name that a misspelled one most likely meant, or None."""
    import difflib

    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return matches[0] if matches else None
