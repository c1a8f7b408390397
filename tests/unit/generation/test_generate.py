from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mambatrain.generation import generate as generate_file
from mambatrain.generation.generate import generate, read_prompt, stream_text
from mambatrain.generation.sampling import SamplingSettings
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection

VOCABULARY, END = 50, 3
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
    return list(
        generate(model, prompt, end_of_document=end, vocab_size=VOCABULARY, max_new_tokens=num, settings=settings)
    )


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
    alone, _ = read_prompt(model, [END, 9, 10], END)
    behind, _ = read_prompt(model, [END, 7, 8, 20, 30, END, 9, 10], END)
    torch.testing.assert_close(behind, alone, rtol=1e-9, atol=1e-9)


def test_a_long_prompt_is_read_in_pieces(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [END, *torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(0)).tolist()]
    whole, _ = read_prompt(model, tokens, END)
    monkeypatch.setattr(generate_file, "PREFILL_TOKENS", 7)
    pieces, _ = read_prompt(model, tokens, END)
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)


def test_memory_does_not_grow_with_the_text(model: LanguageModel) -> None:
    _, short = read_prompt(model, [END, 5], END)
    _, long = read_prompt(model, [END] + [5] * 300, END)
    assert [tensor.shape for layer in short for tensor in layer] == [tensor.shape for layer in long for tensor in layer]


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
    logits, state = read_prompt(model, [END, 5], END)
    assert not logits.requires_grad
    assert not any(tensor.requires_grad for layer in state for tensor in layer)


# Text


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """Every byte a token, and little more: characters beyond ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=262, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(["the then there"], trainer)
    return tokenizer


TEXTS = [
    "the plain text",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 family, 🇫🇷 flag",
    "",
    "a",
    "é",
    "end in é",
    "\N{REPLACEMENT CHARACTER} real one",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_none_has_half_a_character(byte_tokenizer: Tokenizer, text: str) -> None:
    pieces = list(stream_text(byte_tokenizer.encode(text).ids, byte_tokenizer, byte_tokenizer.encode("before ").ids))
    assert "".join(pieces) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert all(pieces)


def test_a_piece_comes_with_the_token_that_completes_it(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("a日b").ids
    assert len(ids) == 5
    num_given = 0

    def give() -> Iterator[int]:
        nonlocal num_given
        for token in ids:
            num_given += 1
            yield token

    assert [(piece, num_given) for piece in stream_text(give(), byte_tokenizer)] == [("a", 1), ("日", 4), ("b", 5)]


def test_bytes_that_are_no_text_are_shown_as_such(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("日").ids
    broken = [ids[0], ids[1], *byte_tokenizer.encode("ab").ids, ids[2], ids[0]]
    pieces = list(stream_text(broken, byte_tokenizer))
    assert "".join(pieces) == byte_tokenizer.decode(broken)
    assert "\N{REPLACEMENT CHARACTER}ab" in "".join(pieces)


def test_bytes_at_random(byte_tokenizer: Tokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(1, 262, (40,), generator=generator).tolist()
        assert "".join(stream_text(ids, byte_tokenizer)) == byte_tokenizer.decode(ids)


def test_special_tokens_are_not_shown(byte_tokenizer: Tokenizer) -> None:
    end = byte_tokenizer.token_to_id("<|endoftext|>")
    ids = [*byte_tokenizer.encode("the").ids, end, *byte_tokenizer.encode("n").ids]
    assert list(stream_text(ids, byte_tokenizer)) == ["the", "n"]


def test_a_tokenizer_that_spells_spaces_at_word_starts() -> None:
    """As SentencePiece does: the space of a text's first word is not decoded, that of any later word is."""
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "▁once", "▁upon", "▁a", "▁", "time"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    words = [vocabulary[piece] for piece in ("▁once", "▁upon", "▁a", "▁", "time")]
    assert tokenizer.decode(words) == "once upon a time"
    assert "".join(stream_text(words, tokenizer)) == "once upon a time"
    assert "".join(stream_text(words[1:], tokenizer, before=words[:1])) == " upon a time"
