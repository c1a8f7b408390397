"""The backend is what was asked for, or an error."""

from __future__ import annotations

import pytest
import torch

from mambatrain.errors import UserError
from mambatrain.ops import causal_conv, native, reference, selective_scan, ssd
from mambatrain.ops.backends import choose_backend

CPU = torch.device("cpu")


def test_torch_is_the_fast_form_of_every_operator() -> None:
    backend = choose_backend("torch", CPU)
    assert (backend.name, backend.reason) == ("torch", "asked for")
    assert backend.selective_scan is selective_scan.selective_scan
    assert backend.ssd is ssd.ssd
    assert backend.causal_conv is causal_conv.causal_conv


def test_reference_is_the_reference() -> None:
    backend = choose_backend("reference", CPU)
    assert backend.name == "reference"
    assert (backend.selective_scan, backend.ssd, backend.causal_conv, backend.softmax_loss) == (
        reference.selective_scan,
        reference.ssd,
        reference.causal_conv,
        reference.softmax_loss,
    )


def test_auto_takes_the_fastest_that_runs_and_says_why() -> None:
    missing = native.why_unavailable()
    backend = choose_backend("auto", CPU)
    assert backend.name == ("native" if missing is None else "torch")
    assert missing is None or missing in backend.reason
    for elsewhere in (choose_backend("auto", torch.device("cuda")), choose_backend("auto", CPU, torch.float64)):
        assert elsewhere.name == "torch"
        assert "native kernels cannot run" in elsewhere.reason


@pytest.mark.parametrize(
    ("device", "dtype", "why"), [("mps", torch.float32, "none for mps"), ("cpu", torch.float64, "float64")]
)
def test_native_is_refused_where_it_cannot_run(device: str, dtype: torch.dtype, why: str) -> None:
    with pytest.raises(UserError, match=f"native kernels cannot run: .*{why}") as caught:
        choose_backend("native", torch.device(device), dtype)
    assert "--kernels torch" in (caught.value.hint or "")


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="'troch'") as caught:
        choose_backend("troch", CPU)
    assert caught.value.hint == "did you mean `--kernels torch`?"
    with pytest.raises(UserError, match="'x'") as caught:
        choose_backend("x", CPU)
    assert caught.value.hint == "--kernels takes auto, native, torch, reference, mamba-ssm"
