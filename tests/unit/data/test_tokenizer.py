from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mambatrain.data import tokenizer as module
from mambatrain.data.tokenizer import END_OF_DOCUMENT_NAMES, encode_alike, load_tokenizer
from mambatrain.errors import UserError

TOKENIZERS = Path(__file__).resolve().parents[4] / "shared" / "data" / "tokenizers"
NEOX = TOKENIZERS / "gpt_neox_20b" / "20B_tokenizer.json"
GOLDEN = TOKENIZERS / "ggml_vocab" / "ggml-vocab-mpt.gguf.inp"
needs_neox = pytest.mark.skipif(not NEOX.is_file(), reason="the GPT-NeoX tokenizer of ../shared/data is not here")

# Newlines, white space and marks that combine, where a cut could go wrong.
TEXTS = st.text(
    st.sampled_from("ab 1'st\n\n\n\t\r\v\x1c\x85\xa0\u2028\u0301.éñ漢😀") | st.characters(exclude_categories=["Cs"])
)


def changed(file: Path, out: Path, change: Callable[[Any], None]) -> Path:
    parts = json.loads(file.read_text(encoding="utf-8"))
    change(parts)
    out.write_text(json.dumps(parts), encoding="utf-8")
    return out


def test_a_file_or_its_folder_loads(byte_tokenizer: Path) -> None:
    for where in (byte_tokenizer, str(byte_tokenizer.parent)):
        loaded = load_tokenizer(where)
        assert loaded.file == byte_tokenizer
        assert loaded.sha256 == hashlib.sha256(byte_tokenizer.read_bytes()).hexdigest()
        assert (loaded.end_of_document, loaded.end_of_document_id) == ("<|endoftext|>", 0)


def test_vocab_size_counts_to_the_highest_id_even_with_gaps(byte_tokenizer: Path, tmp_path: Path) -> None:
    size = load_tokenizer(byte_tokenizer).vocab_size
    assert size == Tokenizer.from_file(str(byte_tokenizer)).get_vocab_size()

    def add(parts: Any) -> None:
        parts["model"]["vocab"]["far"] = size + 99

    assert load_tokenizer(changed(byte_tokenizer, tmp_path / "far.json", add)).vocab_size == size + 100


@given(texts=st.lists(TEXTS, max_size=4), piece=st.integers(1, 9), batch=st.integers(1, 20))
def test_pieces_and_batches_give_the_tokens_of_the_whole(
    byte_tokenizer: Path, texts: list[str], piece: int, batch: int
) -> None:
    loaded = load_tokenizer(byte_tokenizer)
    assert loaded.cuts_at_newlines
    wanted = [Tokenizer.from_file(str(byte_tokenizer)).encode(text, add_special_tokens=False).ids for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_CHARACTERS", piece)
        patch.setattr(module, "BATCH_CHARACTERS", batch)
        ids = loaded.encode_batch(texts)
    assert [row.tolist() for row in ids] == wanted
    assert [loaded.decode(row.tolist()) for row in ids] == texts  # byte-level: every text comes back


@needs_neox
@given(text=TEXTS, piece=st.integers(1, 9))
def test_pieces_give_the_tokens_of_the_whole_with_nfc_and_added_spaces(text: str, piece: int) -> None:
    loaded = neox()
    whole = loaded.encode_batch([text])[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_CHARACTERS", piece)
        assert np.array_equal(loaded.encode_batch([text])[0], whole)


def neox(cache: list[module.LoadedTokenizer] = []) -> module.LoadedTokenizer:  # noqa: B006  (read once)
    if not cache:
        cache.append(load_tokenizer(NEOX))
    return cache[0]


@needs_neox
def test_neox_gives_the_golden_tokens() -> None:
    """llama.cpp's cases for the mpt vocabulary, which is GPT-NeoX's."""
    assert neox().vocab_size == 50_277
    assert neox().cuts_at_newlines
    texts = GOLDEN.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    golden = [[int(part) for part in line.split()] for line in GOLDEN.with_suffix(".out").read_text().splitlines()]
    assert [ids.tolist() for ids in neox().encode_batch(texts)][: len(golden)] == golden
    assert len(golden) > 40


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts["pre_tokenizer"].update(add_prefix_space=True),
        lambda parts: parts["pre_tokenizer"].update(use_regex=False),
        lambda parts: parts.update(pre_tokenizer={"type": "Whitespace"}),
        lambda parts: parts.update(pre_tokenizer=None),
        lambda parts: parts.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
        lambda parts: parts["added_tokens"].append(
            {"id": 400, "content": "end\nof", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False}
        ),
        lambda parts: parts["added_tokens"].append(
            {"id": 400, "content": "tag", "single_word": False, "lstrip": False, "rstrip": True,
             "normalized": False, "special": False}
        ),
    ],
)  # fmt: skip
def test_other_tokenizers_encode_a_document_whole(
    byte_tokenizer: Path, tmp_path: Path, change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = changed(byte_tokenizer, tmp_path / "other.json", change)
    loaded = load_tokenizer(file)
    assert loaded.cut is None
    assert not loaded.cuts_at_newlines
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 1)
    text = "the tag\n end\nof the\n\nmat \n"
    whole = Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids
    assert loaded.encode_batch([text])[0].tolist() == whole


def test_special_tokens_in_a_text_are_plain_text_and_none_is_added(byte_tokenizer: Path, tmp_path: Path) -> None:
    def add_template(parts: Any) -> None:
        parts["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
        }

    file = changed(byte_tokenizer, tmp_path / "template.json", add_template)
    assert Tokenizer.from_file(str(file)).encode("a<|endoftext|>b").ids.count(0) == 2  # what happens without care
    loaded = load_tokenizer(file)
    ids = loaded.encode_batch(["a<|endoftext|>b"])[0].tolist()
    assert 0 not in ids
    assert loaded.decode(ids) == "a<|endoftext|>b"
    assert loaded.decode([0]) == "<|endoftext|>"


def test_truncation_padding_and_dropout_of_the_file_do_not_count(byte_tokenizer: Path, tmp_path: Path) -> None:
    def limit(parts: Any) -> None:
        parts["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        parts["padding"] = {
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        }  # fmt: skip
        parts["model"]["dropout"] = 0.9

    texts = ["the cat sat on the mat"] * 5
    wanted = load_tokenizer(byte_tokenizer).encode_batch(texts)
    ids = load_tokenizer(changed(byte_tokenizer, tmp_path / "limited.json", limit)).encode_batch(texts)
    assert [row.tolist() for row in ids] == [row.tolist() for row in wanted]


@pytest.mark.parametrize("name", END_OF_DOCUMENT_NAMES)
def test_the_end_token_is_found_by_its_usual_names(byte_tokenizer: Path, tmp_path: Path, name: str) -> None:
    def rename(parts: Any) -> None:
        parts["added_tokens"][0]["content"] = name
        parts["model"]["vocab"] = {
            (name if token == "<|endoftext|>" else token): index for token, index in parts["model"]["vocab"].items()
        }

    loaded = load_tokenizer(changed(byte_tokenizer, tmp_path / "named.json", rename))
    assert (loaded.end_of_document, loaded.end_of_document_id) == (name, 0)
    if name != "<|endoftext|>":
        with pytest.raises(UserError, match=r"has no token <\|endoftext\|>"):
            load_tokenizer(tmp_path / "named.json", "<|endoftext|>")


def test_the_end_token_may_be_named_and_a_missing_one_is_refused(byte_tokenizer: Path, tmp_path: Path) -> None:
    assert load_tokenizer(byte_tokenizer, "!").end_of_document_id == 1
    with pytest.raises(UserError, match=r"has no token <\|endoftxt\|>") as caught:
        load_tokenizer(byte_tokenizer, "<|endoftxt|>")
    assert caught.value.hint == "did you mean <|endoftext|>?"
    with pytest.raises(UserError) as caught:
        load_tokenizer(byte_tokenizer, "###")
    assert caught.value.hint == "its special tokens are: <|endoftext|>"

    def remove(parts: Any) -> None:
        parts["added_tokens"] = []
        del parts["model"]["vocab"]["<|endoftext|>"]

    with pytest.raises(UserError, match="has no token that ends a document") as caught:
        load_tokenizer(changed(byte_tokenizer, tmp_path / "endless.json", remove))
    assert caught.value.hint == "--end-of-document names another"


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist") as caught:
        load_tokenizer(tmp_path / "tokeniser.json")
    assert caught.value.hint == "`mambatrain tokenizer train` makes a tokenizer"
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint == "name one of its files: tokenizer_config.json"
    for content in (b"{}", b"\xff\xfe", b"", b'{"version": "1.0"}'):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match="is not a tokenizer"):
            load_tokenizer(tmp_path)


def test_vocabularies_are_compared_by_their_ids(byte_tokenizer: Path, tmp_path: Path) -> None:
    same = tmp_path / "same.json"
    Tokenizer.from_file(str(byte_tokenizer)).save(str(same), pretty=False)
    assert same.read_bytes() != byte_tokenizer.read_bytes()
    assert encode_alike(byte_tokenizer, same)

    def swap(parts: Any) -> None:
        vocabulary = parts["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    assert not encode_alike(byte_tokenizer, changed(byte_tokenizer, tmp_path / "other.json", swap))

    def split_otherwise(parts: Any) -> None:
        parts["pre_tokenizer"]["add_prefix_space"] = not parts["pre_tokenizer"]["add_prefix_space"]

    assert not encode_alike(byte_tokenizer, changed(byte_tokenizer, tmp_path / "split.json", split_otherwise))
