"""Each rule against a statement of it that is too slow to be wrong, and all of them against transformers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambatrain.errors import UserError
from mambatrain.generation.sampling import SamplingSettings, penalised, probabilities, sample

VOCABULARY = 12
logits_lists = st.lists(st.floats(-8, 8, width=32).map(lambda x: round(x, 2)), min_size=VOCABULARY, max_size=VOCABULARY)


def softmax(scores: list[float]) -> list[float]:
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def by_brute_force(scores: list[float], settings: SamplingSettings) -> list[float]:
    """Word for word what the settings' docstrings say."""
    scores = [score / settings.temperature for score in scores]
    if settings.top_k:
        last = sorted(scores, reverse=True)[min(settings.top_k, len(scores)) - 1]
        scores = [score if score >= last else -math.inf for score in scores]
    chances = softmax(scores)
    if settings.top_p < 1:
        kept: set[int] = set()
        for index in sorted(range(len(chances)), key=lambda index: -chances[index]):
            if sum(chances[other] for other in kept) >= settings.top_p:
                break
            kept.add(index)
        chances = [chance if index in kept else 0.0 for index, chance in enumerate(chances)]
    if settings.min_p:
        chances = [chance if chance >= settings.min_p * max(chances) else 0.0 for chance in chances]
    return [chance / sum(chances) for chance in chances]


def assert_same(scores: list[float], settings: SamplingSettings) -> None:
    expected = torch.tensor(by_brute_force(scores, settings), dtype=torch.float64)
    found = probabilities(torch.tensor(scores), settings).double()
    # Where a sum of chances meets a threshold to the last bit, either side is right: such cases are not drawn below.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@given(logits_lists, st.sampled_from([0.05, 0.5, 1.0, 3.0]))
def test_temperature(scores: list[float], temperature: float) -> None:
    assert_same(scores, SamplingSettings(temperature=temperature))


@given(logits_lists, st.integers(1, VOCABULARY + 3))
def test_top_k(scores: list[float], top_k: int) -> None:
    assert_same(scores, SamplingSettings(top_k=top_k))


@given(logits_lists, st.floats(0.01, 0.99))
def test_top_p(scores: list[float], top_p: float) -> None:
    chances = sorted(softmax(scores), reverse=True)
    if min(abs(sum(chances[:count]) - top_p) for count in range(VOCABULARY + 1)) > 1e-5:
        assert_same(scores, SamplingSettings(top_p=top_p))


@given(logits_lists, st.floats(0.01, 0.99))
def test_min_p(scores: list[float], min_p: float) -> None:
    chances = softmax(scores)
    if min(abs(chance / max(chances) - min_p) for chance in chances) > 1e-5:
        assert_same(scores, SamplingSettings(min_p=min_p))


@given(logits_lists, st.sampled_from([0.7, 1.0, 1.3, 2.0]), st.lists(st.integers(0, VOCABULARY - 1), max_size=6))
def test_repetition_penalty(scores: list[float], penalty: float, previous: list[int]) -> None:
    expected = list(scores)
    for index in set(previous):  # once, however often it was seen
        expected[index] = scores[index] / penalty if scores[index] > 0 else scores[index] * penalty
    torch.testing.assert_close(penalised(torch.tensor(scores), penalty, previous), torch.tensor(expected))


def test_the_fewest_ids_that_reach_top_p() -> None:
    scores = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()  # exact sums: the threshold is met
    assert probabilities(scores, SamplingSettings(top_p=0.75)).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert probabilities(scores, SamplingSettings(top_p=0.1)).tolist() == [1, 0, 0, 0]


def test_the_rules_together_are_those_of_transformers() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    settings = SamplingSettings(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.3)
    previous = torch.randint(0, 100, (1, 30), generator=torch.Generator().manual_seed(1))
    for seed in range(20):
        scores = 3 * torch.randn(100, generator=torch.Generator().manual_seed(seed))
        expected = scores[None]
        for rule in (
            process.RepetitionPenaltyLogitsProcessor(1.3),
            process.TemperatureLogitsWarper(0.7),
            process.TopKLogitsWarper(40),
            process.TopPLogitsWarper(0.9),
            process.MinPLogitsWarper(0.05),
        ):
            expected = rule(previous, expected)
        found = probabilities(penalised(scores, 1.3, previous[0].tolist()), settings)
        torch.testing.assert_close(found, expected[0].softmax(0), rtol=1e-5, atol=1e-7)


def test_temperature_0_is_greedy_and_draws_nothing() -> None:
    settings = SamplingSettings(temperature=0.0)
    generator = settings.generator()
    before = generator.get_state()
    assert sample(torch.tensor([0.1, 2.0, 1.9]), settings, generator, [], 3) == 1
    assert torch.equal(generator.get_state(), before)


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    settings = SamplingSettings(temperature=1e-35)
    logits = torch.tensor([1.0, 20_000.0, 19_000.0])  # over the temperature, beyond what fp32 holds
    assert sample(logits, settings, settings.generator(), [], 3) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_rows_are_never_drawn(temperature: float) -> None:
    settings = SamplingSettings(temperature=temperature)
    generator = settings.generator()
    logits = torch.tensor([0.0, 1.0, 50.0, 60.0])
    assert {sample(logits, settings, generator, [], 2) for _ in range(200)} <= {0, 1}


def test_ids_come_as_often_as_they_are_likely() -> None:
    settings = SamplingSettings(temperature=0.5, seed=3)
    generator = settings.generator()
    logits = torch.tensor([0.0, 0.5, 1.0])
    draws = torch.tensor([sample(logits, settings, generator, [], 3) for _ in range(6000)])
    expected = torch.tensor(softmax([0.0, 1.0, 2.0]))
    # Standard deviation of a share is below 0.0065: five of them.
    torch.testing.assert_close(draws.bincount(minlength=3) / 6000, expected, rtol=0, atol=0.033)


def test_a_seed_gives_one_sequence_and_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    logits = torch.zeros(1000)

    def draw(seed: int) -> list[int]:
        settings = SamplingSettings(seed=seed)
        generator = settings.generator()
        return [sample(logits, settings, generator, [], 1000) for _ in range(5)]

    assert draw(7) == draw(7) != draw(8)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name):
        SamplingSettings(**{name: value})  # type: ignore[arg-type]
