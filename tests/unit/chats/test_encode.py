"""Tokens of conversations, and which of them count, against what the text says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mambatrain.chats.encode import ChatEncoder, EncodedChat
from mambatrain.data.tokenizer import load_tokenizer, with_special_tokens

TEXT = "<|endoftext|><a>import os, sys\n<b>  def 🐈 naïve(x):\n<|endoftext|>\n"


@pytest.fixture
def encoder(tiny_shards: Path) -> ChatEncoder:
    return ChatEncoder(with_special_tokens(load_tokenizer(tiny_shards / "tokenizer.json"), ["<a>", "<b>"]))


def encode(encoder: ChatEncoder, counted: str, max_tokens: int | None = None) -> EncodedChat:
    start = TEXT.index(counted)
    return encoder.encode([TEXT], [[(start, start + len(counted))]], max_tokens)[0]


def test_tokens_that_hold_a_counted_character_count(encoder: ChatEncoder, tiny_shards: Path) -> None:
    loaded = with_special_tokens(load_tokenizer(tiny_shards / "tokenizer.json"), ["<a>", "<b>"])
    chat = encode(encoder, "  def 🐈 naïve(x):\n<|endoftext|>")
    assert loaded.decode(chat.ids) == TEXT
    assert loaded.decode(chat.ids[chat.counted]) == "  def 🐈 naïve(x):\n<|endoftext|>"
    assert chat.num_counted_bytes == len("  def 🐈 naïve(x):\n".encode())  # a special token is no text
    assert chat.num_cut == (0, 0)
    assert {512, 513} <= set(chat.ids.tolist())


def test_the_space_before_a_word_belongs_to_its_token(encoder: ChatEncoder) -> None:
    # A tokenizer that trims offsets would say that " os" begins at its o, and count it one character later.
    whole, part = encode(encoder, " os"), encode(encoder, "import")
    assert not (whole.counted & part.counted).any()
    assert whole.counted.sum() >= 1


def test_the_first_token_never_counts(encoder: ChatEncoder) -> None:
    assert not encode(encoder, "<|endoftext|>").counted[0]


def test_what_is_cut_off_is_counted(encoder: ChatEncoder) -> None:
    whole = encode(encoder, "naïve(x):\n<|endoftext|>")
    stop = int(np.flatnonzero(whole.counted)[1]) + 1
    cut = encode(encoder, "naïve(x):\n<|endoftext|>", stop)
    assert np.array_equal(cut.ids, whole.ids[:stop])
    assert cut.counted.sum() == 2
    assert cut.num_cut == (len(whole.ids) - stop, int(whole.counted.sum()) - 2)
    assert 0 < cut.num_counted_bytes < whole.num_counted_bytes
