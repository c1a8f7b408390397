"""The objective of preference pairs against finite differences, whole logits, and answers that are read alone."""

from __future__ import annotations

import math

import pytest
import torch
from adapted_models import base_model, section_of
from torch import Tensor
from torch.nn import functional as F

from mambatrain.data.batches import IGNORED_TARGET, MicroBatch
from mambatrain.models.language_model import LanguageModel
from mambatrain.recipe import PreferenceSection
from mambatrain.training.preference_loss import PreferenceLoss, answer_log_probabilities

LENGTH, VOCABULARY = 20, 40
# Tokens of the prompt, of the chosen and of the rejected answer, of each pair: rows of 20 hold both, with padding.
SIZES = [(3, 4, 6), (2, 8, 1), (4, 2, 5)]
BLOCKS = ["mamba1", "mamba2"]


def answers() -> list[tuple[int, list[Tensor]]]:
    """Of each pair, the length of the prompt, and both conversations' ids."""
    generator = torch.Generator().manual_seed(5)
    pairs = []
    for num_prompt, *lengths in SIZES:
        prompt = torch.randint(0, VOCABULARY, (num_prompt,), generator=generator)
        replies = [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]
        pairs.append((num_prompt, [torch.cat([prompt, reply]) for reply in replies]))
    return pairs


def rows() -> MicroBatch:
    """A pair a row, as `PairRows` lays them out, and a last row that does not count."""
    pairs = answers()
    tokens = torch.zeros(len(pairs) + 1, LENGTH, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED_TARGET)
    boundaries = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (num_prompt, both) in enumerate([*pairs, pairs[0]]):
        place = 0
        for ids in both:
            here = slice(place, place + len(ids) - 1)
            tokens[row, here], boundaries[row, place] = ids[:-1], True
            if row < len(pairs):
                targets[row, place + num_prompt - 1 : here.stop] = ids[num_prompt:]
            place = here.stop
    references = torch.linspace(-40.0, -20.0, 2 * len(tokens), dtype=torch.float64).view(-1, 2)
    return MicroBatch(tokens, boundaries, targets, references)


def model_of(block: str) -> LanguageModel:
    model = base_model(section_of(block), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from the uniform distribution of the first weights
        model.embedding.weight.copy_(torch.randn(model.embedding.weight.shape, generator=generator))
    return model


def loss_of_logits(model: LanguageModel, batch: MicroBatch, section: PreferenceSection) -> tuple[Tensor, Tensor]:
    """Each answer alone, from whole logits: the sum of the losses, and the rewards."""
    assert batch.references is not None
    rewards = []
    for (num_prompt, both), reference in zip(answers(), batch.references, strict=False):
        of_pair = []
        for ids, known in zip(both, reference, strict=True):
            logits, _ = model(ids[None, :-1])
            log_p = F.log_softmax(logits, dim=-1).gather(2, ids[None, 1:, None])[0, num_prompt - 1 :, 0]
            difference = log_p.sum() - known
            of_pair.append(section.beta * (difference / len(log_p) if section.length_normalised else difference))
        rewards.append(torch.stack(of_pair))
    found = torch.stack(rewards)
    return torch.log1p(torch.exp(found[:, 1] - found[:, 0])).sum(), found


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_loss_curves_and_gradients_are_those_of_whole_logits(block: str, normalised: bool) -> None:
    model, batch = model_of(block), rows()
    section = PreferenceSection(beta=0.4, length_normalised=normalised)
    objective = PreferenceLoss(model, section)
    sums = objective(*batch.inputs)
    wanted, rewards = loss_of_logits(model, batch, section)
    margins = rewards[:, 0] - rewards[:, 1]
    assert sums.dtype == torch.float64 and objective.num_summands(batch) == len(SIZES)
    curves = [margins.sum(), (margins > 0).sum().double(), rewards[:, 0].sum(), rewards[:, 1].sum()]
    torch.testing.assert_close(sums, torch.stack([wanted, *curves]), rtol=1e-12, atol=1e-12)
    assert 0 < int((margins > 0).sum()) < len(SIZES)  # a wrong sign would not show
    (of_curves,) = torch.autograd.grad(sums[1:].sum(), model.norm_f.weight, retain_graph=True)
    assert not of_curves.any()
    parameters = dict(model.named_parameters())
    grads = [torch.autograd.grad(loss, list(parameters.values())) for loss in (sums[0], wanted)]
    for name, one, other in zip(parameters, *grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_are_finite_differences(block: str) -> None:
    model, batch = model_of(block), rows()
    objective = PreferenceLoss(model, PreferenceSection(beta=0.4, length_normalised=True))
    names = ["layers.0.mixer.in_proj.weight", "layers.1.mixer.A_log", "embedding.weight", "norm_f.weight"]
    parameters = [model.get_parameter(name) for name in names]
    grads = torch.autograd.grad(objective(*batch.inputs)[0], parameters)
    generator = torch.Generator().manual_seed(7)
    for name, parameter, grad in zip(names, parameters, grads, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        step, ends = 1e-5, []  # the loss is about 10: its rounding is worth 1e-9 of a difference over 2e-5
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                ends.append(float(objective(*batch.inputs)[0]))
                parameter.sub_(sign * step * direction)
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float((grad * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("block", BLOCKS)
def test_an_answer_in_a_row_with_another_is_what_it_is_alone(block: str) -> None:
    model, batch = model_of(block), rows()
    with torch.no_grad():
        found, num_counted = answer_log_probabilities(model, *batch[:3])
        for row, (num_prompt, both) in enumerate(answers()):
            for side, ids in enumerate(both):
                targets = torch.where(torch.arange(1, len(ids)) < num_prompt, IGNORED_TARGET, ids[1:])
                alone = model.summed_loss(ids[None, :-1], None, targets[None])
                assert float(found[row, side]) == pytest.approx(-float(alone), rel=1e-12)
    assert num_counted.tolist() == [*([chosen, rejected] for _, chosen, rejected in SIZES), [0, 0]]
    assert found[-1].tolist() == [0.0, 0.0]


def test_the_reference_itself_has_a_loss_of_ln_2_and_measuring_leaves_no_trace() -> None:
    model, batch = model_of("mamba1"), rows()
    with torch.no_grad():
        known, _ = answer_log_probabilities(model, *batch[:3])
    objective = PreferenceLoss(model, PreferenceSection())
    model.train()
    found = objective.measure([batch._replace(references=known)])
    assert found == [pytest.approx(len(SIZES) * math.log(2.0), rel=1e-15), 0.0, 0.0, 0.0, 0.0, len(SIZES)]
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_what_is_far_from_the_reference_stays_finite() -> None:
    model, batch = model_of("mamba1"), rows()
    assert batch.references is not None
    far = batch._replace(references=torch.tensor([[-1e6, 1e6], [1e6, -1e6], [0.0, 0.0], [0.0, 0.0]]).double())
    sums = PreferenceLoss(model, PreferenceSection())(*far.inputs)
    assert sums.isfinite().all() and sums[0].item() > 1e5
    (grad,) = torch.autograd.grad(sums[0], model.embedding.weight)
    assert grad.isfinite().all() and grad.any()
