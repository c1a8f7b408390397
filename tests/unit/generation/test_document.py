import re
from pathlib import Path

import pytest
import torch

from mambatrain.data.tokenizer import LoadedTokenizer, load_tokenizer
from mambatrain.errors import UserError
from mambatrain.generation import document
from mambatrain.generation.document import iter_pieces, read_document
from mambatrain.generation.reading import Reader
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection

TEXT = "naïve café\r\n\n  two words\n日本語 and\t1,234 more; <|endoftext|> is text.\n" * 40


@pytest.fixture(scope="module")
def tokenizer(tiny_shards: Path) -> LoadedTokenizer:
    return load_tokenizer(tiny_shards / "tokenizer.json")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    return file


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 17, 1000, 100_000])
def test_pieces_join_to_the_text_and_are_encoded_as_it(
    tokenizer: LoadedTokenizer, file: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    monkeypatch.setattr(document, "READ_BYTES", num_bytes)
    pieces = list(iter_pieces(file, tokenizer.cut))
    assert "".join(piece for piece, _ in pieces) == TEXT
    assert pieces[-1][1] == len(TEXT.encode())
    ids = [token for piece, _ in pieces for token in tokenizer.encode_batch([piece])[0].tolist()]
    assert ids == tokenizer.tokenizer.encode(TEXT, add_special_tokens=False).ids
    # Lookahead needs the next character, so that reads of one character can never be cut.
    if num_bytes in (17, 1000):
        assert (
            max(len(piece) for piece, _ in pieces) < 2 * num_bytes + 20
        )  # held is a read and what it cut off, no more


def test_a_reader_is_given_the_tokens_of_the_text(tokenizer: LoadedTokenizer, file: Path) -> None:
    section = ModelSection(d_model=16, num_layers=1, vocab_size=tokenizer.vocab_size, d_state=8)
    model = LanguageModel(section, choose_backend("torch", torch.device("cpu")))
    initialise(model, section, seed=1)
    end = tokenizer.end_of_document_id
    told: list[int] = []
    reader, whole = Reader(model, end), Reader(model, end)
    reader.add([end])
    read_document(file, reader, tokenizer, told.append)
    whole.add([end, *tokenizer.encode_batch([TEXT])[0].tolist()])
    assert reader.num_tokens == whole.num_tokens
    torch.testing.assert_close(reader.logits(), whole.logits(), rtol=1e-5, atol=1e-5)
    assert told[-1] == len(TEXT.encode())


@pytest.mark.parametrize("num_bytes", [1, 4, 1 << 16])
@pytest.mark.parametrize(("content", "byte"), [(b"caf\xe9!", 3), (b"ab\n\xe6\x97", 3), ("日本".encode() + b"\xff", 6)])
def test_the_byte_that_is_no_utf8_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, byte: int, num_bytes: int
) -> None:
    monkeypatch.setattr(document, "READ_BYTES", num_bytes)
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"bad.txt is not UTF-8: byte {byte}$"):
        list(iter_pieces(tmp_path / "bad.txt", re.compile(r"\S(?=\n)")))


def test_a_text_without_a_place_to_cut_is_held_no_longer_than_it_can_be_encoded(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "READ_BYTES", 10)
    monkeypatch.setattr(document, "MAX_UNCUT_CHARACTERS", 50)
    first, num_bytes = next(iter_pieces(file, None))
    assert 50 < len(first) <= 60
    assert num_bytes < 90
