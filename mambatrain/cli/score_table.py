"""The numbers of `evaluate` in columns."""

from __future__ import annotations

from typing import Any


def result_lines(results: dict[str, Any]) -> list[str]:
    """What was measured, for people; the numbers in full are in the JSON."""
    lines: list[str] = []
    if "held_out" in results:
        lines += held_out_lines(results["held_out"])
    if "tasks" in results:
        lines += [""] if lines else []
        lines += task_lines(results["tasks"])
    return lines


def held_out_lines(held_out: dict[str, Any]) -> list[str]:
    return [
        f"held-out text of {held_out['data']}: {held_out['num_documents']:,} documents, "
        f"{held_out['num_tokens']:,} tokens, {_count(held_out['num_bytes'])} bytes, rows of {held_out['row_tokens']:,}",
        f"  nats per token  {held_out['nats_per_token']:.4f}",
        f"  perplexity      {held_out['perplexity']:.4g}",
        f"  bits per byte   {_bits_per_byte(held_out['bits_per_byte'])}",
    ]


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _bits_per_byte(value: float | None) -> str:
    return "not available: nothing says how many bytes the text has" if value is None else f"{value:.4f}"


def task_lines(scores: list[dict[str, Any]]) -> list[str]:
    """One line a number; an arrow says which way is better."""
    rows = [("task", "metric", "value", "", "std. error", "shots", "documents")]
    for score in scores:
        arrow = {True: "↑", False: "↓"}.get(score["higher_is_better"], "")
        extracted_by = "" if score["filter"] == "none" else f" ({score['filter']})"
        rows.append(
            (
                score["task"],
                score["metric"] + extracted_by,
                _shown(score["value"]),
                arrow,
                "" if score["stderr"] is None else f"± {_shown(score['stderr'])}",
                str(score["num_fewshot"]),
                "" if score["num_documents"] is None else f"{score['num_documents']:,}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = {2, 5, 6}  # columns of plain numbers
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _shown(value: float) -> str:
    """Four decimals; the perplexity of an untrained model is too large for them."""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"
