"""The C++ softmax cross-entropy against PyTorch's, both against fp64; and in its place, the chunked loss of a model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mambatrain.ops import native
from mambatrain.ops.cross_entropy import CHUNK, chunked_cross_entropy, plain_softmax_loss
from mambatrain.ops.native.cpu import library

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))

LEVELS = [level for level in ("x86-64-v2", "x86-64-v3", "x86-64-v4", "neon") if library.library_path(level).exists()]
LEVELS = LEVELS[: LEVELS.index(library.processor_level()) + 1]  # what this processor can run
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make(rows: int, columns: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    logits = (spread * torch.randn(rows, columns, generator=generator)).to(dtype)
    return logits, torch.randint(0, columns, (rows,), generator=generator)


@every_dtype
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 63, 64, 65, 1000, 50_277])
def test_as_right_as_the_plain_form(
    columns: int, level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "processor_level", lambda: level)
    logits, targets = make(7, columns, dtype)
    truth, true_gradient = plain_softmax_loss(logits.double(), targets, True)
    plain, plain_gradient = plain_softmax_loss(logits.clone(), targets, True)
    found, gradient = native.softmax_loss(logits, targets, True)
    assert gradient is not None and plain_gradient is not None and true_gradient is not None
    rounding = torch.finfo(torch.float32).eps
    for ours, theirs, wanted in ((found, plain, truth), (gradient, plain_gradient, true_gradient)):
        assert ours.dtype == theirs.dtype
        allowed = 2 * (theirs.double() - wanted).abs().max() + 4 * rounding * wanted.abs().max()
        assert (ours.double() - wanted).abs().max() <= allowed


@every_dtype
def test_gradients_take_the_place_of_the_logits(dtype: torch.dtype) -> None:
    logits, targets = make(5, 100, dtype)
    before = logits.clone()
    alone, none = native.softmax_loss(logits, targets, False)
    assert none is None
    assert torch.equal(logits, before)
    losses, gradient = native.softmax_loss(logits, targets, True)
    assert gradient is not None and gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(losses, alone)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 5, 63, 64, 99])
def test_what_is_not_finite_is_not_hidden(bad: float, column: int) -> None:
    logits, targets = make(3, 100)
    wanted, _ = native.softmax_loss(logits.clone(), targets, False)
    logits[1, column] = bad
    losses, gradient = native.softmax_loss(logits, targets, True)
    assert losses[1].isnan() and gradient is not None and not gradient[1].isfinite().all()
    assert torch.equal(losses[[0, 2]], wanted[[0, 2]])


def test_far_apart_logits() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0], [-math.inf, 0.0, 0.0]])
    losses, gradient = native.softmax_loss(logits, torch.tensor([2, 1, 1]), True)
    assert losses.tolist() == pytest.approx([2e4, 0.0, math.log(2.0)])
    assert gradient is not None
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0, -1], [0, 0, 0], [0, -0.5, 0.5]]), rtol=0, atol=1e-30)


def test_the_same_bits_on_any_number_of_threads() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            logits, targets = make(64, 5000)
            losses, _ = native.softmax_loss(logits, targets, True)
            results.append((losses, logits))
    finally:
        torch.set_num_threads(before)
    for losses, gradient in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("target", [-1, 100, -100])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    logits, targets = make(3, 100)
    before = logits.clone()
    targets[1] = target
    with pytest.raises(ValueError, match="V = 100"):
        native.softmax_loss(logits, targets, True)
    assert torch.equal(logits, before)


def test_other_dtypes_and_layouts_are_refused() -> None:
    logits, targets = make(3, 100)
    for wrong in (logits.double(), logits.half(), logits.T.contiguous().T):
        with pytest.raises(ValueError, match="contiguous"):
            native.softmax_loss(wrong, targets, True)
    with pytest.raises(ValueError, match="targets"):
        native.softmax_loss(logits, targets[:2], True)


def test_no_rows() -> None:
    losses, gradient = native.softmax_loss(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), True)
    assert losses.shape == (0,) and gradient is not None and gradient.shape == (0, 9)


def test_opcheck() -> None:
    logits, targets = make(3, 100)
    torch.library.opcheck(torch.ops.mambatrain.softmax_loss.default, (logits, targets, True))


@pytest.mark.parametrize("autocast", [False, True])
def test_in_the_chunked_loss(autocast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    positions, vocabulary = CHUNK + 77, 300
    hidden = torch.randn(positions, 16, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, vocabulary, (positions,), generator=generator)
    targets[::5] = -100
    results = []
    for softmax_loss in (native.softmax_loss, plain_softmax_loss):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = chunked_cross_entropy(hidden, weight, targets, softmax_loss)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    tolerance = 1e-3 if autocast else 1e-6  # a gradient may round to the bf16 beside it
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).abs().max() <= tolerance * plain.abs().max()
