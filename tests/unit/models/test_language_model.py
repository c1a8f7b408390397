"""One forward path: cut anywhere, packed or separate, token by token, in every backend, for both models."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.models.state import BlockState
from mambatrain.ops import native
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection

BLOCKS = ["mamba1", "mamba2"]
BACKENDS = ["torch", "reference"]
MAX_TOKENS = 140  # more than two chunks of the torch backend
CPU = torch.device("cpu")


def tiny_section(block: str, **changes: object) -> ModelSection:
    """A model whose every token can have a row of the embedding of its own."""
    sizes: dict[str, object] = {"d_model": 16, "num_layers": 2, "d_state": 4, "vocab_size": MAX_TOKENS}
    sizes |= {"head_dim": 8, "num_groups": 2} if block == "mamba2" else {}
    return ModelSection.model_validate({"block": block, **sizes, **changes})


def tiny_model(
    block: str, backend: str = "torch", dtype: torch.dtype = torch.float64, **changes: object
) -> LanguageModel:
    section = tiny_section(block, **changes)
    model = LanguageModel(section, choose_backend(backend, CPU)).to(dtype)
    initialise(model, section, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("dt_bias", "dt_proj.bias")):
                parameter.add_(3.0)  # delta near 1: what a token leaves behind reaches far ahead
            if name.endswith("A_log"):
                parameter.sub_(3.0)
    return model


def largest_error(one: Tensor, other: Tensor) -> float:
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def run_in_pieces(
    model: LanguageModel, tokens: Tensor, boundaries: Tensor | None, cuts: list[int]
) -> tuple[Tensor, list[BlockState]]:
    edges = [0, *sorted(cuts), tokens.shape[1]]
    state: list[BlockState] | None = None
    logits = []
    for start, end in pairwise(edges):
        here = None if boundaries is None else boundaries[:, start:end]
        piece, state = model(tokens[:, start:end], here, state)
        logits.append(piece)
    assert state is not None
    return torch.cat(logits, dim=1), state


lengths = st.integers(1, MAX_TOKENS)


@st.composite
def rows_with_cuts(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int]]:
    """Two rows of tokens, boundaries in them, and places to cut."""
    length = draw(lengths)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    tokens = torch.randint(0, MAX_TOKENS, (2, length), generator=generator)
    boundaries = torch.rand(2, length, generator=generator) < draw(st.sampled_from([0.0, 0.03, 0.3, 1.0]))
    cuts = draw(st.lists(st.integers(1, max(1, length - 1)), max_size=4, unique=True)) if length > 1 else []
    return tokens, boundaries, cuts


@pytest.mark.parametrize("block", BLOCKS)
@given(rows=rows_with_cuts())
@settings(max_examples=15)
def test_cut_anywhere_changes_nothing(block: str, rows: tuple[Tensor, Tensor, list[int]]) -> None:
    tokens, boundaries, cuts = rows
    model = tiny_model(block)
    parameters = list(model.parameters())
    whole, state = model(tokens, boundaries)
    pieces, last_state = run_in_pieces(model, tokens, boundaries, cuts)
    assert largest_error(pieces, whole) < 1e-12
    for one, other in zip(last_state, state, strict=True):
        assert largest_error(one.window, other.window) < 1e-12
        assert largest_error(one.ssm, other.ssm) < 1e-12
    weights = torch.linspace(-1, 1, whole.numel(), dtype=whole.dtype).view_as(whole)
    expected = torch.autograd.grad((whole * weights).sum(), parameters)
    found = torch.autograd.grad((pieces * weights).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        assert largest_error(one, other) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", BLOCKS)
def test_one_token_at_a_time_equals_the_sequence(block: str, backend: str) -> None:
    tokens = torch.randint(0, MAX_TOKENS, (2, 40), generator=torch.Generator().manual_seed(0))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = tiny_model(block, backend, dtype)
        with torch.inference_mode():
            whole, _ = model(tokens)
            single, _ = run_in_pieces(model, tokens, None, list(range(1, 40)))
        assert largest_error(single, whole) < tolerance


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths of documents that fill at most one row, and one of them."""
    lengths = draw(st.lists(st.integers(1, 45), min_size=2, max_size=5))
    while sum(lengths) > MAX_TOKENS:
        lengths.pop()
    return lengths, draw(st.integers(0, len(lengths) - 1))


@pytest.mark.parametrize("block", BLOCKS)
@given(row=documents())
@settings(max_examples=20)
def test_packed_equals_separate_and_no_gradient_crosses(block: str, row: tuple[list[int], int]) -> None:
    lengths, chosen = row
    model = tiny_model(block, tie_embeddings=False)
    tokens = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(len(lengths)))[None]  # each once
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    boundaries = torch.zeros_like(tokens, dtype=torch.bool)
    boundaries[0, starts] = True
    _, state = model(torch.arange(MAX_TOKENS)[None, :9])
    packed, _ = model(tokens, boundaries, state)  # the boundary at 0 has to drop this state
    span = slice(starts[chosen], starts[chosen] + lengths[chosen])
    own = tokens[:, span]
    assert largest_error(packed[:, span], model(own)[0]) < 1e-12
    (gradient,) = torch.autograd.grad(packed[:, span].square().sum(), model.embedding.weight)
    others = torch.ones(gradient.shape[0], dtype=torch.bool)
    others[own[0]] = False
    assert (gradient[others] == 0).all()  # exactly: also of the tokens that made the state
    assert (gradient[own[0, 0]] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", BLOCKS)
def test_an_inf_does_not_reach_the_next_document(block: str, backend: str) -> None:
    model = tiny_model(block, backend, tie_embeddings=False)
    tokens = torch.arange(100)[None]
    boundaries = (tokens % 33 == 0) & (tokens > 0)
    with torch.inference_mode():
        clean, _ = model(tokens, boundaries)
        model.embedding.weight[40] = torch.inf
        dirty, _ = model(tokens, boundaries)
    assert not dirty[:, 40:66].isfinite().all()
    for others in (slice(0, 40), slice(66, 100)):  # a backend may compute such a row in another order
        assert largest_error(dirty[:, others], clean[:, others]) < 1e-12


@pytest.mark.parametrize("block", BLOCKS)
def test_the_empty_state_is_what_no_state_means(block: str) -> None:
    model = tiny_model(block)
    tokens = torch.arange(20).view(2, 10)
    without, after = model(tokens)
    with_empty, after_too = model(tokens, None, model.init_state(2, "cpu", torch.float64))
    assert torch.equal(without, with_empty)
    for one, other in zip(after, after_too, strict=True):
        assert torch.equal(one.window, other.window)
        assert torch.equal(one.ssm, other.ssm)
        assert one.ssm.dtype == torch.float64


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("block", BLOCKS)
def test_checkpointed_activations_give_the_same_bits_from_less_memory(block: str, backend: str) -> None:
    if backend == "native" and (missing := native.why_unavailable()) is not None:
        pytest.skip(missing)
    dtype = torch.float32 if backend == "native" else torch.float64
    model = tiny_model(block, backend, dtype, num_layers=6)
    tokens, boundaries = torch.arange(100).view(2, 50), torch.arange(100).view(2, 50) % 17 == 0

    def kept_and_results(recompute_every: int) -> tuple[int, list[Tensor]]:
        kept, model.recompute_every = 0, recompute_every

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model.summed_loss(tokens, boundaries, tokens.roll(-1))
        return kept, [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    (kept_all, expected), *others = [kept_and_results(every) for every in (0, 3, 2, 1)]
    kept = [kept_all, *(few for few, _ in others)]
    assert kept == sorted(set(kept), reverse=True), "a block more that is computed again keeps less"
    assert kept[-1] < kept_all / 4
    for _, found in others:
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_head_is_the_embedding_only_when_tied(block: str) -> None:
    tied, untied = tiny_model(block), tiny_model(block, tie_embeddings=False)
    assert tied.head_weight is tied.embedding.weight
    assert untied.head_weight is untied.lm_head.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    logits, _ = untied(torch.arange(5)[None])
    hidden, _ = untied.hidden_states(torch.arange(5)[None])
    assert torch.allclose(logits, hidden @ untied.lm_head.weight.T)


def test_logits_cover_the_padded_vocabulary() -> None:
    model = tiny_model("mamba1", vocab_size=101, pad_vocab_multiple=16)
    assert model(torch.tensor([[100, 0]]))[0].shape == (1, 2, 112)
