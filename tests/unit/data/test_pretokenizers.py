"""Where a text may be cut: the pieces, encoded alone, give the tokens of the whole."""

from __future__ import annotations

import gzip
import json
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from mambatrain.data.pretokenizers import (
    PRETOKENIZER_NAMES,
    PretokenizerName,
    cut_of,
    cut_text,
    make_pretokenizer,
    pretokenizer_name,
    safe_cut,
)

PRETRAIN = Path(__file__).resolve().parents[4] / "shared" / "data" / "pretrain"
NEOX = PRETRAIN.parent / "tokenizers" / "gpt_neox_20b" / "20B_tokenizer.json"

# Letters, digits and marks of many scripts, every kind of white space, and what the patterns treat in a way of its own.
TEXTS = st.text(
    st.sampled_from(
        "aZs tdrelvm'’12½٣.,;:!?()\"/+=-_\n\n\r\t\v\x1c\x85\xa0\u2028\u3000\u0301\u0338éßñжя漢字。、アかญก한\U0001f600"
    )
    | st.characters(exclude_categories=["Cs"]),
    max_size=60,
)  # fmt: skip


@cache
def trained(name: PretokenizerName, composing: bool = False) -> Tokenizer:
    """A tokenizer that has merged across everything that its pre-tokenizer lets together."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = make_pretokenizer(name)
    if composing:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        "it's they'll WE'RE 123456 x1y2 a.b, (c) d! e? \n\n\n f  g\t\th \r\n\r\n ...\n!!!\n 'tis a'b a-b/c漢字。仮名、"
    ]
    tokenizer.train_from_iterator(texts * 50, trainer)
    tokenizer.encode_special_tokens = True  # as `load_tokenizer` has it
    return tokenizer


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", PRETOKENIZER_NAMES)
@settings(max_examples=400)
@given(text=TEXTS, size=st.integers(1, 9), composing=st.booleans())
@example(text="a's b's漢。字", size=1, composing=True)
@example(text="x  \n\n  y . \n!\n\nz", size=1, composing=False)
@example(text="a.\n\nb!\nc)\r\n d/\n", size=1, composing=False)
@example(text="a\u0338 =\u0338 b=\u0338", size=1, composing=True)
def test_pieces_join_to_the_text_and_their_tokens_to_its_tokens(
    name: PretokenizerName, text: str, size: int, composing: bool
) -> None:
    tokenizer = trained(name, composing)
    cut = safe_cut(tokenizer)
    assert cut is cut_of(name)
    pieces = list(cut_text(text, size, cut))
    assert "".join(pieces) == text
    assert all(len(piece) >= size for piece in pieces[:-1])
    assert [token for piece in pieces for token in ids_of(tokenizer, piece)] == ids_of(tokenizer, text)
    # Stronger: whatever the vocabulary, each part is the same.
    text = unicodedata.normalize("NFC", text) if composing else text
    assert [part for piece in cut_text(text, size, cut) for part in parts_of(tokenizer, piece)] == parts_of(
        tokenizer, text
    )


def parts_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """What nothing is merged across."""
    return [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", PRETOKENIZER_NAMES)
def test_a_text_without_line_ends_is_cut_and_one_without_any_place_stays_whole(name: PretokenizerName) -> None:
    cut = cut_of(name)
    for text in ("words and words " * 100, "名前はまだ無い。どこで生れたか、" * 100, "YWJj+ZGVm/Z2hp9" * 100):
        assert max(map(len, cut_text(text, 50, cut))) < 70
    assert list(cut_text("acgt" * 1000, 50, cut)) == ["acgt" * 1000]
    assert list(cut_text("", 50, cut)) == [""]


@pytest.mark.skipif(not NEOX.is_file(), reason="the texts and the tokenizer of ../shared/data are not here")
@pytest.mark.parametrize("name", ["tldr_multilingual", "udhr_multilingual", "tang_poems_zh"])
def test_real_text_of_many_languages_without_line_ends(name: str) -> None:
    """Thirty documents at a time are joined without white space between them, as one line."""
    with gzip.open(PRETRAIN / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines][::20]
    tokenizer = Tokenizer.from_file(str(NEOX))
    cut = safe_cut(tokenizer)
    assert cut is not None
    num_pieces = 0
    for first in range(0, len(texts), 30):
        for between in ("", "\n"):
            text = between.join(texts[first : first + 30]).replace("\n", between)
            pieces = list(cut_text(text, 200, cut))
            num_pieces += len(pieces)
            encoded = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
            assert [token for piece in encoded for token in piece.ids] == ids_of(tokenizer, text)
    assert num_pieces > 100


def test_no_second_half_composes_with_what_is_before_it() -> None:
    """NFC of the parts is NFC of the whole: every character that a cut may stand before is inert to its left."""
    second = [character for character in map(chr, range(0x110000)) if cut_of("gpt-2").match("a" + character)]
    assert len(second) > 40
    for character in second:
        assert unicodedata.combining(character) == 0
        assert unicodedata.is_normalized("NFC", character)
        assert unicodedata.category(character)[0] not in "LM"


@pytest.mark.parametrize("name", PRETOKENIZER_NAMES)
def test_ways_to_split_are_recognised_by_name(name: PretokenizerName) -> None:
    tokenizer = Tokenizer.from_str(trained(name).to_str())
    assert pretokenizer_name(tokenizer) == name


def test_other_tokenizers_are_not_cut() -> None:
    tokenizer = Tokenizer.from_str(trained("gpt-2").to_str())
    assert safe_cut(tokenizer) is not None
    tokenizer.add_tokens([AddedToken("plain words"), AddedToken("   ")])
    assert safe_cut(tokenizer) is None  # "plain| words" might be cut
    for change in (AddedToken("x", rstrip=True), AddedToken("x", lstrip=True), AddedToken("x", single_word=True)):
        tokenizer = Tokenizer.from_str(trained("gpt-2").to_str())
        tokenizer.add_tokens([change])
        assert safe_cut(tokenizer) is None
    tokenizer = Tokenizer.from_str(trained("gpt-2").to_str())
    tokenizer.add_tokens([AddedToken("   "), AddedToken("\n\n"), AddedToken("<|x")])
    assert safe_cut(tokenizer) is not None
    tokenizer.normalizer = normalizers.NFKC()
    assert safe_cut(tokenizer) is None
    tokenizer = Tokenizer.from_str(trained("gpt-2").to_str())
    for other in (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.Whitespace(),
        pre_tokenizers.Metaspace(),
    ):
        tokenizer.pre_tokenizer = other
        assert (pretokenizer_name(tokenizer), safe_cut(tokenizer)) == (None, None)
    assert safe_cut(Tokenizer(models.Unigram([("a", 0.0)], 0))) is None
