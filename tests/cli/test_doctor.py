"""`mambatrain doctor` as a user runs it: without a network, and on a broken installation."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_the_findings_for_people_and_as_json(run_mambatrain: Run) -> None:
    done = run_mambatrain("doctor", "--json", environment={"HF_HUB_OFFLINE": "0"})
    assert (done.returncode, done.stderr) == (0, "")
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert {"python", "torch", "numpy", "memory", "disk", "kernels cpu", "torch cpu", "rendezvous", "wandb"} <= set(
        findings
    )
    assert findings["hub"]["status"] == "note"  # the proxy of the suite leads nowhere
    assert all(set(finding) == {"subject", "status", "value", "mend"} for finding in findings.values())
    assert all(finding["mend"] for finding in findings.values() if finding["status"] == "problem")


def test_it_does_not_fail_where_torch_is_broken(run_mambatrain: Run, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')\n"
    )
    path = os.pathsep.join([str(tmp_path / "broken"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = run_mambatrain("doctor", environment={"PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    assert "problem  torch " in done.stdout
    assert "problem  kernels" in done.stdout
    assert "libcudart.so.13" in done.stdout
    assert "  memory " in done.stdout
    assert "problem(s)" in done.stdout.splitlines()[-1]
