"""A trained state stands before a document: training, evaluation and generation begin with it alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted_models import CPU, adapted, base_model, section_of, some_rows
from torch import Tensor

from mambatrain.adapters.initial_state import InitialState, begin_rows
from mambatrain.data.batches import MicroBatch
from mambatrain.errors import UserError
from mambatrain.evaluation.held_out import measure_held_out
from mambatrain.generation.reading import Reader, boundary_behind
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.state import TextState
from mambatrain.recipe import AdapterSection
from mambatrain.runs.state_file import blend_states, facts_of, place_state, read_state_file, write_state_file
from mambatrain.runs.weights import Weights
from mambatrain.training.objective import NextTokenLoss

BLOCKS = ["mamba1", "mamba2"]
END = 7


def moved(block: str, window: bool = True) -> tuple[LanguageModel, InitialState]:
    model = base_model(section_of(block))
    _, start = adapted(model, AdapterSection(kind="state", window=window))
    assert start is not None
    return model, start


def logits_behind(model: LanguageModel, start: InitialState, ids: list[int]) -> Tensor:
    """As in training: the state, then the whole row, and no boundary at its first position."""
    with torch.no_grad():
        boundaries, state = begin_rows(start.layers(), torch.tensor([[True] + [False] * (len(ids) - 1)]))
        return model(torch.tensor([ids]), boundaries, state)[0][0, -1]


def weights_of(model: LanguageModel) -> Weights:
    return Weights(model.section, dict(model.named_parameters()), None, "here", "abc")


@pytest.mark.parametrize("block", BLOCKS)
def test_generation_begins_as_training_did(block: str, tmp_path: Path) -> None:
    """By way of a file. A boundary at the token that opens the document would drop the state."""
    model, start = moved(block)
    with torch.no_grad():
        state = TextState(start.layers(), None, 0, frozenset())
    file = tmp_path / "tuned.state.safetensors"
    write_state_file(file, state, facts_of(weights_of(model), "tok", "trained", state))
    found = read_state_file(file)
    placed = place_state(found, file, weights_of(model), "tok", model.head_weight)
    ids = [END, 1, 2, 3, 4]
    reader = Reader(model, boundary_behind(placed, END), placed)
    for token in ids:
        reader.add([token])
        found_logits = reader.logits()
    expected = logits_behind(model, start, ids)
    torch.testing.assert_close(found_logits, expected)
    dropped = Reader(model, boundary_behind(None, END))
    dropped.add(ids)
    assert (dropped.logits() - expected).abs().max() > 1e-3
    assert reader.num_tokens == len(ids) and reader.seen_ids == set(ids)


@pytest.mark.parametrize("block", BLOCKS)
def test_only_the_rows_own_first_boundary_is_left_unset(block: str) -> None:
    _, start = moved(block)
    _, boundaries, _ = some_rows()
    given, state = begin_rows(start.layers(), boundaries)
    assert boundaries[:, 0].all() and not given[:, 0].any()
    assert torch.equal(given[:, 1:], boundaries[:, 1:]) and boundaries[:, 1:].any()
    assert state is not None and all(len(layer.ssm) == len(layer.window) == len(boundaries) for layer in state)
    assert begin_rows(None, boundaries) == (boundaries, None)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_held_out_loss_begins_with_it_too(block: str) -> None:
    model, start = moved(block)
    batch = MicroBatch(*some_rows())
    trained = NextTokenLoss(model, start)(*batch).item()
    measured = measure_held_out(model, [batch], None, start.layers())
    assert measured.nats == pytest.approx(trained, rel=1e-6)
    assert measure_held_out(model, [batch], None).nats != pytest.approx(trained, rel=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_without_windows_the_convolution_begins_empty(block: str) -> None:
    _, start = moved(block, window=False)
    assert all(not layer.window.any() and layer.ssm.any() for layer in start.layers())
    assert len(list(start.parameters())) == 2


@pytest.mark.parametrize("block", BLOCKS)
def test_states_of_two_kinds_are_not_blended(block: str, tmp_path: Path) -> None:
    model, start = moved(block)
    with torch.no_grad():
        before = TextState(start.layers(), None, 0, frozenset())
        behind = TextState(start.layers(), torch.ones(16), 3, frozenset([1]))
    files = []
    for name, state in (("before", before), ("behind", behind)):
        write_state_file(tmp_path / name, state, facts_of(weights_of(model), "tok", name, state))
        files.append(read_state_file(tmp_path / name))
    with pytest.raises(UserError, match="stands before a text and the other behind one"):
        blend_states(files[0], files[1], 0.5)
    blended, facts = blend_states(files[0], files[0], 0.25)
    assert blended.hidden is None and facts.num_tokens == 0
    torch.testing.assert_close(blended.layers[1].ssm, before.layers[1].ssm)


def test_a_state_of_unknown_tokens_fits_any_tokenizer_of_its_weights(tmp_path: Path) -> None:
    model, start = moved("mamba1")
    with torch.no_grad():
        state = TextState(start.layers(), None, 0, frozenset())
    file = tmp_path / "state"
    write_state_file(file, state, facts_of(weights_of(model), "", "trained", state))
    assert place_state(read_state_file(file), file, weights_of(model), "any", torch.zeros(1, device=CPU)).hidden is None
