"""What reaches a user says what to do next."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_mistake_has_a_hint() -> None:
    files = [*(REPOSITORY / "mambatrain").rglob("*.py"), *(REPOSITORY / "data_scripts").glob("*.py")]
    calls = [
        (f"{file.relative_to(REPOSITORY)}:{node.lineno}", len(node.args) + len(node.keywords))
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError"
    ]
    assert len(calls) > 100
    assert [place for place, num_arguments in calls if num_arguments < 2] == []
