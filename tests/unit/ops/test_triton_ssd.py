"""Mamba-2's scan in Triton as an operator of torch, where no kernel runs; `tests/parity/interpreted` runs them."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mambatrain.errors import UserError
from mambatrain.ops import native, reference
from mambatrain.ops.backends import choose_backend
from mambatrain.ops.triton import ssd as triton_ssd
from mambatrain.ops.triton.ssd import ssd


def arguments(device: str = "meta", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    along_time = {"x": (2, 37, 6, 8), "dt": (2, 37, 6), "B": (2, 37, 2, 24), "C": (2, 37, 2, 24)}
    fixed = {"A": (6,), "D": (6,), "dt_bias": (6,), "initial_state": (2, 6, 8, 24)}
    return {
        **{name: torch.zeros(size, device=device, dtype=dtype) for name, size in along_time.items()},
        **{name: torch.zeros(size, device=device) for name, size in fixed.items()},
    }


def test_the_signature_is_the_references() -> None:
    assert inspect.signature(ssd) == inspect.signature(reference.ssd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_meta_tensors_have_the_right_shapes(dtype: torch.dtype) -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments(dtype=dtype).items()}
    y, state = ssd(**leaves)
    assert (y.shape, y.dtype, y.device.type) == ((2, 37, 6, 8), dtype, "meta")
    assert (state.shape, state.dtype, state.device.type) == ((2, 6, 8, 24), torch.float32, "meta")
    grads = torch.autograd.grad([y.float().sum(), state.sum()], list(leaves.values()))
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 37, 6, 8, dtype=torch.float64)}, "x has dtype torch.float64"),
        ({"dt": torch.zeros(2, 36, 6)}, r"should be .* \(2, 37, 6\)"),
        ({"x": torch.zeros(2, 37, 6, 257), "initial_state": None}, "P should be 1 to 256, but is 257"),
        ({"B": torch.zeros(2, 37, 2, 300), "C": torch.zeros(2, 37, 2, 300), "initial_state": None}, "N should be 1"),
        ({"boundaries": torch.zeros(2, 37)}, "boundaries has dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd(**(arguments("cpu") | change))


def test_triton_is_not_imported_before_a_backend_on_cuda_is_chosen() -> None:
    code = (
        "import sys, torch; from mambatrain.ops.backends import choose_backend; "
        "choose_backend('auto', torch.device('cpu')); print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_native_on_cuda_takes_it_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(native, "why_unavailable", lambda device, dtype: None)
    monkeypatch.setattr(native, "describe", lambda device: "a GPU that is not here")
    monkeypatch.setattr(triton_ssd, "why_unavailable", lambda: None)
    assert choose_backend("native", cuda).ssd is ssd
    monkeypatch.setattr(triton_ssd, "why_unavailable", lambda: "no Triton")
    with pytest.raises(UserError, match="native kernels cannot run: no Triton"):
        choose_backend("native", cuda)
    assert "no Triton" in choose_backend("auto", cuda).reason


def test_a_missing_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("triton", "mambatrain.ops.triton.")) and name != triton_ssd.__name__:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "needs Triton" in (triton_ssd.why_unavailable() or "")
