"""What doctor says of the backends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mambatrain.ops.backends import choose_backend
from mambatrain.planning import kernels

CPU = torch.device("cpu")


def test_each_backend_that_runs_here_is_right_and_has_a_speed() -> None:
    found = {finding.subject: finding for finding in kernels.look_at_kernels()}
    chosen = choose_backend("auto", CPU)
    assert found["kernels cpu"].value == f"auto takes {chosen.name}: {chosen.reason}"
    for name in {chosen.name, "torch", "reference"}:
        assert found[f"{name} cpu"].status == "ok"
        assert found[f"{name} cpu"].value.startswith("right; tokens/s in training")


def test_a_backend_that_is_wrong_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    right = choose_backend("torch", CPU)

    def wrong_conv(*arguments: object, **options: object) -> object:
        y, window = right.causal_conv(*arguments, **options)  # type: ignore[arg-type]
        return y * 1.01, window

    wrong = replace(right, causal_conv=wrong_conv)  # type: ignore[arg-type]
    monkeypatch.setattr(kernels, "choose_backend", lambda name, device: wrong)
    monkeypatch.setattr(kernels, "BACKENDS", {"torch": 1})
    found = {finding.subject: finding for finding in kernels.look_at_kernels()}
    assert found["torch cpu"].status == "problem"
    assert "causal_conv" in found["torch cpu"].value
