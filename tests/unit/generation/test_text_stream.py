from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mambatrain.generation.text_stream import TextStream, stream_text


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


def test_whether_all_that_came_was_shown(byte_tokenizer: Tokenizer) -> None:
    stream = TextStream(byte_tokenizer)
    shown = [(stream.add(token), stream.is_whole) for token in byte_tokenizer.encode("a日b").ids[:4]]
    assert shown == [("a", True), ("", False), ("", False), ("日", True)]
    stream.add(byte_tokenizer.encode("日").ids[0])
    assert (stream.is_whole, stream.rest()) == (False, "\N{REPLACEMENT CHARACTER}")
