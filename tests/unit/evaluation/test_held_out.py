import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambatrain.data.batches import IGNORED_TARGET, MicroBatch
from mambatrain.evaluation.held_out import HeldOutLoss, evaluating, measure_held_out
from mambatrain.evaluation.loss_by_position import (
    LossByPosition,
    draw_loss_by_position,
    log_spaced_bins,
    measure_loss_by_position,
)
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection

VOCABULARY, ROWS, LENGTH = 40, 3, 24


@pytest.fixture(scope="module", params=["mamba1", "mamba2"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    widths = {"head_dim": 8, "d_state": 8} if request.param == "mamba2" else {}
    section = ModelSection(block=request.param, d_model=16, num_layers=2, vocab_size=VOCABULARY, **widths)
    model = LanguageModel(section, choose_backend("torch", torch.device("cpu")))
    initialise(model, section, seed=1)
    return model


@pytest.fixture(scope="module")
def micro_batches() -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(2):
        tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
        targets = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
        targets[torch.rand(targets.shape, generator=generator) < 0.3] = IGNORED_TARGET
        boundaries = torch.rand(tokens.shape, generator=generator) < 0.1
        batches.append(MicroBatch(tokens, boundaries, targets))
    return batches


@torch.no_grad()
def losses_one_by_one(model: LanguageModel, batch: MicroBatch) -> Tensor:
    """(B, L) fp64, each row alone, from the logits of the whole vocabulary."""
    rows = []
    for tokens, boundaries, targets in zip(*batch.inputs, strict=True):
        logits, _ = model(tokens[None], boundaries[None])
        rows.append(F.cross_entropy(logits[0].double(), targets, ignore_index=IGNORED_TARGET, reduction="none"))
    return torch.stack(rows)


def test_the_sum_over_counted_targets(model: LanguageModel, micro_batches: list[MicroBatch]) -> None:
    loss = measure_held_out(model, micro_batches, num_bytes=123)
    expected = sum(losses_one_by_one(model, batch).sum().item() for batch in micro_batches)
    assert loss.nats == pytest.approx(expected, rel=1e-6)
    assert loss.num_targets == sum(int((batch.targets >= 0).sum()) for batch in micro_batches)
    assert loss.num_bytes == 123


def test_shares_of_ranks_add_up(model: LanguageModel, micro_batches: list[MicroBatch]) -> None:
    whole = measure_held_out(model, micro_batches, 10)
    shares = [measure_held_out(model, [batch], 10) for batch in micro_batches]
    assert sum(share.nats for share in shares) == pytest.approx(whole.nats, rel=1e-12)
    assert sum(share.num_targets for share in shares) == whole.num_targets


def test_the_units() -> None:
    loss = HeldOutLoss(nats=80 * math.log(2), num_targets=10, num_bytes=20)
    assert loss.nats_per_token == pytest.approx(8 * math.log(2))
    assert loss.perplexity == pytest.approx(256)
    assert loss.bits_per_byte == pytest.approx(4)
    assert HeldOutLoss(1e6, 10, 20).perplexity == math.inf
    assert math.isnan(HeldOutLoss(math.nan, 10, 20).nats_per_token)


@pytest.mark.parametrize(
    "measure", [lambda model, batches: measure_held_out(model, batches, 1), measure_loss_by_position]
)
def test_nothing_is_left_changed(model: LanguageModel, micro_batches: list[MicroBatch], measure) -> None:  # type: ignore[no-untyped-def]
    model.train()
    model.layers[0].eval()  # a part that is frozen on purpose stays so
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before = torch.get_rng_state()
    measure(model, micro_batches)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not model.layers[0].training and model.layers[1].training
    assert torch.is_grad_enabled()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.grad is not None and bool((parameter.grad == 1).all())
    model.train().zero_grad()


def test_the_model_can_be_trained_afterwards(model: LanguageModel, micro_batches: list[MicroBatch]) -> None:
    measure_held_out(model, micro_batches, 1)
    model(micro_batches[0].tokens)[0].sum().backward()
    model.zero_grad()


def test_the_mode_comes_back_after_an_error(model: LanguageModel) -> None:
    model.train()
    with pytest.raises(RuntimeError, match="in the middle"), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError("in the middle")
    assert model.training and torch.is_grad_enabled()


# By position


def test_each_position_has_its_own_sum(
    model: LanguageModel, micro_batches: list[MicroBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mambatrain.evaluation.loss_by_position.CHUNK_TOKENS", 10)  # cuts rows in the middle
    positions = measure_loss_by_position(model, micro_batches)
    expected = sum((losses_one_by_one(model, batch).sum(0) for batch in micro_batches), torch.zeros(LENGTH).double())
    torch.testing.assert_close(positions.nats, expected, rtol=1e-5, atol=1e-5)
    counted = torch.cat([batch.targets for batch in micro_batches]) != IGNORED_TARGET
    assert torch.equal(positions.num_targets, counted.sum(0))


def test_positions_add_up_to_the_held_out_loss(model: LanguageModel, micro_batches: list[MicroBatch]) -> None:
    summed, whole = (
        measure_loss_by_position(model, micro_batches).held_out(7),
        measure_held_out(model, micro_batches, 7),
    )
    assert summed.nats == pytest.approx(whole.nats, rel=1e-6)
    assert summed[1:] == whole[1:]


@pytest.mark.parametrize("length", [1, 2, 7, 512, 2048])
def test_bins_cover_every_position_once(length: int) -> None:
    losses = LossByPosition(torch.arange(length).double(), torch.full((length,), 2))
    bins = log_spaced_bins(losses)
    assert [position for one in bins for position in range(one.first, one.last + 1)] == list(range(1, length + 1))
    assert sum(one.nats_per_token * one.num_targets for one in bins) == pytest.approx(sum(range(length)))
    assert len(bins) <= 4 * math.log2(length) + 5
    widths = [one.last - one.first + 1 for one in bins][:-1]  # the last may be cut short
    assert widths == sorted(widths)


def test_positions_without_targets_have_no_bin() -> None:
    losses = LossByPosition(torch.tensor([3.0, 0.0, 5.0]), torch.tensor([1, 0, 2]))
    assert [(one.first, one.last, one.nats_per_token) for one in log_spaced_bins(losses)] == [(1, 1, 3.0), (3, 3, 2.5)]


def test_the_picture_is_a_png(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "loss.png"
    losses = LossByPosition(torch.linspace(600, 300, 128).double(), torch.full((128,), 100))
    draw_loss_by_position(log_spaced_bins(losses), "a title", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
