import pytest
import torch

from mambatrain.generation import reading
from mambatrain.generation.generate import generate, open_document
from mambatrain.generation.reading import Reader
from mambatrain.generation.sampling import SamplingSettings
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.models.state import BlockState, TextState
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection

VOCABULARY, END = 50, 3
LONG = [END, *torch.randint(4, VOCABULARY, (40,), generator=torch.Generator().manual_seed(0)).tolist()]
GREEDY = SamplingSettings(temperature=0.0)


@pytest.fixture(scope="module", params=["mamba1", "mamba2"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    widths = {"head_dim": 8, "d_state": 8} if request.param == "mamba2" else {}
    section = ModelSection(
        block=request.param, d_model=16, num_layers=2, vocab_size=VOCABULARY, tie_embeddings=False, **widths
    )
    model = LanguageModel(section, choose_backend("torch", torch.device("cpu")))
    initialise(model, section, seed=1)
    torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(4))  # logits far apart
    return model.double()


def continuation(
    model: LanguageModel, prompt: list[int], settings: SamplingSettings = GREEDY, num: int = 12, end: int = END
) -> list[int]:
    reader = Reader(model, end)
    reader.add(open_document(prompt, end))
    return list(generate(reader, end_of_document=end, vocab_size=VOCABULARY, max_new_tokens=num, settings=settings))


def read(model: LanguageModel, tokens: list[int], start: TextState | None = None) -> TextState:
    reader = Reader(model, END, start)
    reader.add(tokens)
    return reader.state()


def logits(model: LanguageModel, state: TextState) -> torch.Tensor:
    return Reader(model, END, state).logits()


@torch.no_grad()
def without_state(model: LanguageModel, prompt: list[int], num: int = 12, end: int = END) -> list[int]:
    """Greedy decoding that reads everything again for each token."""
    tokens = [end, *prompt]
    while len(tokens) < 1 + len(prompt) + num:
        row = torch.tensor([tokens])
        token = int(model(row, row == end)[0][0, -1, :VOCABULARY].argmax())
        if token == end:
            break
        tokens.append(token)
    return tokens[1 + len(prompt) :]


@pytest.mark.parametrize("prompt", [[], [5], [7, 8, 9, 10], [7, 8, END, 9, 10]])
def test_from_the_state_as_from_the_whole_text(model: LanguageModel, prompt: list[int]) -> None:
    found = continuation(model, prompt)
    assert found == without_state(model, prompt)


def test_it_ends_with_the_document_and_does_not_show_the_end_token(model: LanguageModel) -> None:
    lengths = set()
    for end in range(20, 32):
        found = continuation(model, [7, 8], end=end)
        assert end not in found
        assert found == without_state(model, [7, 8], end=end)
        lengths.add(len(found))
    assert lengths - {0, 12}, "some of these texts should end early, or this test shows nothing"


def test_a_prompt_after_an_end_token_reads_nothing_of_what_was_before(model: LanguageModel) -> None:
    alone = logits(model, read(model, [END, 9, 10]))
    behind = logits(model, read(model, [END, 7, 8, 20, 30, END, 9, 10]))
    torch.testing.assert_close(behind, alone, rtol=1e-9, atol=1e-9)


def test_without_a_boundary_token_the_end_token_is_one_like_any_other(model: LanguageModel) -> None:
    tokens = [7, 8, END, 9, 10]
    reader = Reader(model, None)
    reader.add(tokens)
    torch.testing.assert_close(reader.logits(), model(torch.tensor([tokens]))[0][0, -1], rtol=1e-9, atol=1e-9)
    assert (reader.logits() - logits(model, read(model, tokens))).abs().max() > 1e-3


def test_a_long_text_is_read_in_pieces(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(model, LONG)
    monkeypatch.setattr(reading, "PREFILL_TOKENS", 7)
    lengths = []
    hook = model.embedding.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    pieces = read(model, LONG)
    hook.remove()
    assert lengths == [7] * 5 + [6]
    torch.testing.assert_close(logits(model, pieces), logits(model, whole), rtol=1e-9, atol=1e-9)
    assert (pieces.num_tokens, pieces.seen_ids) == (41, frozenset(LONG)) == (whole.num_tokens, whole.seen_ids)


def test_cut_anywhere(model: LanguageModel) -> None:
    whole = read(model, LONG)
    for cut in range(1, len(LONG)):
        behind = read(model, LONG[cut:], start=read(model, LONG[:cut]))
        torch.testing.assert_close(logits(model, behind), logits(model, whole), rtol=1e-9, atol=1e-9)
        assert (behind.num_tokens, behind.seen_ids) == (whole.num_tokens, whole.seen_ids)


def test_a_batch_of_states_of_ragged_prompts_is_as_one_at_a_time(model: LanguageModel) -> None:
    """States have one shape whatever was read, so that they stack without padding."""
    states = [read(model, LONG[:length]) for length in (1, 5, 17, 41)]
    stacked = [
        BlockState(*map(torch.cat, zip(*layers, strict=True)))
        for layers in zip(*(s.layers for s in states), strict=True)
    ]
    then = torch.tensor([[8, 9, 10]] * 4)
    together, _ = model(then, None, stacked)
    for row, state in enumerate(states):
        alone = logits(model, read(model, [8, 9, 10], start=state))
        torch.testing.assert_close(together[row, -1], alone, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_ragged_prompts_in_one_batch_are_as_one_at_a_time(model: LanguageModel) -> None:
    """Padded on the left, with a boundary where each begins; then each goes on by its own tokens."""
    prompts = [LONG[:length] for length in (1, 5, 17, 41)]
    rows = torch.tensor([[8] * (len(LONG) - len(prompt)) + prompt for prompt in prompts])
    hidden, layers = model.hidden_states(rows, rows == END)
    texts: list[list[int]] = [[] for _ in prompts]
    for _ in range(8):
        logits_of_all = hidden[:, -1] @ model.head_weight.T
        for row, prompt in enumerate(prompts):
            alone = read(model, prompt + texts[row])
            torch.testing.assert_close(logits_of_all[row], logits(model, alone), rtol=1e-9, atol=1e-9)
            for together, own in zip(layers, alone.layers, strict=True):
                torch.testing.assert_close(together.ssm[row], own.ssm[0], rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(together.window[row], own.window[0], rtol=1e-9, atol=1e-12)
        chosen = logits_of_all[:, :VOCABULARY].argmax(1)
        chosen[chosen == END] = 5  # a new document would forget what is compared
        for text, token in zip(texts, chosen.tolist(), strict=True):
            text.append(token)
        hidden, layers = model.hidden_states(chosen[:, None], None, layers)
    assert len({tuple(text) for text in texts}) == len(prompts)


def test_a_state_is_not_changed_by_reading_on(model: LanguageModel) -> None:
    state = read(model, LONG[:10])
    kept = [tensor.clone() for layer in state.layers for tensor in layer]
    read(model, LONG[10:], start=state)
    assert all(torch.equal(a, b) for a, b in zip(kept, (t for layer in state.layers for t in layer), strict=True))
    assert state.num_tokens == 10


def test_memory_does_not_grow_with_the_text(model: LanguageModel) -> None:
    short, long = read(model, [END, 5]), read(model, [END] + [5] * 300)
    assert [tensor.shape for layer in short.layers for tensor in layer] == [
        tensor.shape for layer in long.layers for tensor in layer
    ]


def test_the_number_of_new_tokens_is_kept_and_none_is_computed_in_vain(model: LanguageModel) -> None:
    calls = []
    hook = model.embedding.register_forward_hook(lambda *_: calls.append(1))
    assert continuation(model, [7], num=0) == []
    calls.clear()
    assert len(continuation(model, [7], num=3)) == 3
    hook.remove()
    assert len(calls) == 3  # the prompt, and two of the three tokens


def test_a_seed_is_a_text(model: LanguageModel) -> None:
    one = continuation(model, [7], SamplingSettings(seed=1))
    assert (
        one == continuation(model, [7], SamplingSettings(seed=1)) != continuation(model, [7], SamplingSettings(seed=2))
    )


def test_a_repetition_penalty_counts_the_prompt(model: LanguageModel) -> None:
    # So strong a penalty that nothing is said twice, the prompt included.
    found = continuation(model, [7, 8], SamplingSettings(temperature=0.0, repetition_penalty=1e6), num=15)
    assert len({7, 8, *found}) == 2 + len(found)


def test_no_gradient_is_kept(model: LanguageModel) -> None:
    state = read(model, [END, 5])
    assert not logits(model, state).requires_grad and not state.hidden.requires_grad
    assert not any(tensor.requires_grad for layer in state.layers for tensor in layer)
