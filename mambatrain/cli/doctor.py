"""`doctor`: what works on this machine."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    json_wanted: Annotated[bool, typer.Option("--json", help="Write the findings as JSON.")] = False,
) -> None:
    """Look at Python, torch, GPUs, kernels, memory, disk, network and packages; say what mends what is wrong.

    It changes nothing, works without a network, and ends with 0 whatever it finds.

    Example: mambatrain doctor
    """
    import json
    from dataclasses import asdict

    from mambatrain.planning.doctor import examine_machine

    findings = examine_machine()
    if json_wanted:
        print(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
        return
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{finding.status:<7}  {finding.subject:<{width}}  {finding.value}")
        if finding.mend is not None:
            print(f"{'':<7}  {'':<{width}}  -> {finding.mend}")
    counts = {status: sum(finding.status == status for finding in findings) for status in ("problem", "note")}
    print(f"{counts['problem']} problem(s), {counts['note']} note(s)")
