from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models

from mambatrain.data.inspect_tokenizer import describe_tokenizer, pieces_of
from mambatrain.data.tokenizer import load_tokenizer


def test_pieces_are_the_bytes_of_the_text_in_order(byte_tokenizer: Path) -> None:
    loaded = load_tokenizer(byte_tokenizer)
    text = "The cat's é 漢<|endoftext|>\n"
    pieces = pieces_of(loaded, text)
    assert [token for token, _ in pieces] == loaded.encode_batch([text])[0].tolist()
    values = [eval(piece) for _, piece in pieces]
    assert b"".join(value if isinstance(value, bytes) else value.encode() for value in values) == text.encode()
    assert "' cat'" in [piece for _, piece in pieces]
    assert any(piece.startswith("b'\\x") for _, piece in pieces)
    assert 0 not in [token for token, _ in pieces]


def test_a_tokenizer_is_described(byte_tokenizer: Path, tmp_path: Path) -> None:
    lines = "\n".join(describe_tokenizer(load_tokenizer(byte_tokenizer)))
    assert "BPE" in lines
    assert "<|endoftext|> (0)" in lines
    assert "pre-tokenizer    gpt-2" in lines
    assert "are cut" in lines
    Tokenizer(models.WordLevel({"</s>": 0, "x": 1}, unk_token="x")).save(str(tmp_path / "w.json"))
    loaded = load_tokenizer(tmp_path / "w.json")
    lines = "\n".join(describe_tokenizer(loaded))
    assert "not one that llama.cpp is known to name" in lines
    assert "are encoded whole" in lines
    assert pieces_of(loaded, "x") == [(1, "'x'")]
