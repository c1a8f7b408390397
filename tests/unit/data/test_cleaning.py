from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers

from mambatrain.data import cleaning as module
from mambatrain.data.cleaning import CleanDocument, Cleaner, normalizer_changes, word_runs_of, words_of
from mambatrain.data.documents import Document
from mambatrain.data.manifest import CleaningOptions
from mambatrain.data.sources import find_sources

PASSAGE = "The quick brown fox jumps over the lazy dog while seven wizards watch from a tower"  # 16 words


def clean(texts: list[str], cleaner: Cleaner | None = None, **options: Any) -> tuple[list[str], dict[str, int]]:
    cleaner = cleaner or Cleaner(CleaningOptions(**options))
    documents = [Document(text, f"a:{number}") for number, text in enumerate(texts)]
    return [document.text for document in cleaner.clean(documents)], dict(cleaner.counts)


def test_nothing_is_done_unless_it_is_asked_for() -> None:
    texts = ["e\u0301", "x", "x", "a\0b", "c\r\nd", "long " * 1000]
    kept, counts = clean([*texts, "", " \n\u00a0"])
    assert kept == texts
    assert counts == {"num_with_nul": 1, "num_with_crlf": 1, "num_skipped_empty": 2}
    document = next(iter(Cleaner(CleaningOptions()).clean([Document("é", "a:1")])))
    assert document == CleanDocument("é", "a:1", 2, b"", b"")


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_normalization_is_unicodes_and_counts_what_it_changes(form: Any) -> None:
    texts = ["e\u0301", "ﬁne", "plain", "漢"]
    kept, counts = clean(texts, normalize=form)
    assert kept == [unicodedata.normalize(form, text) for text in texts]
    assert counts == {"num_normalized": 2 if form == "NFKC" else 1}


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
@given(
    text=st.text(
        st.sampled_from("ab e\u0301\u0338\u1100\u1161\u11a8ﬁ½=<.\n ,1é") | st.characters(exclude_categories=["Cs"])
    )
)
def test_normalization_in_pieces_is_that_of_the_whole(form: Any, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_CHARACTERS", 2)
        assert module.is_normalized(form, text) == unicodedata.is_normalized(form, text)
        kept, _ = clean(["x" + text], normalize=form)
    assert kept == [unicodedata.normalize(form, "x" + text)]


def test_lengths_are_of_the_normalized_text_and_limits_belong_to_what_is_kept() -> None:
    kept, counts = clean(
        ["e\u0301e\u0301", "abc", "abcd", "abcde"], normalize="NFC", min_characters=3, max_characters=4
    )
    assert kept == ["abc", "abcd"]
    assert counts == {"num_normalized": 1, "num_too_short": 1, "num_too_long": 1}


def test_the_digest_is_of_the_cleaned_text() -> None:
    cleaner = Cleaner(CleaningOptions(normalize="NFC", deduplicate=True))
    digests = [document.digest for document in cleaner.clean([Document("e\u0301", "a"), Document("é", "b")])]
    assert digests == [hashlib.blake2b("é".encode(), digest_size=16).digest()] * 2


def test_words_are_lower_case_without_punctuation_and_characters_where_no_spaces_are_written() -> None:
    assert words_of("It's “42” Élan—vital\n") == ["it", "s", "42", "élan", "vital"]
    assert words_of("名前は、まだ。ok") == ["名", "前", "は", "ま", "だ", "ok"]


def evaluation(folder: Path) -> dict[int, set[str]]:
    rows = [
        {"passage": PASSAGE, "answer": "yes"},
        {"question": "How many wizards are there in the tower?", "choices": {"text": ["seven", "too few words"]}},
    ]
    file = folder / "task.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return word_runs_of(find_sources([file]).files)


def test_documents_that_share_a_run_of_words_with_an_evaluation_text_are_left_out(tmp_path: Path) -> None:
    runs = evaluation(tmp_path)
    assert {length: len(known) for length, known in runs.items()} == {13: 4, 8: 1}
    words = PASSAGE.split()
    texts = [
        "Once, " + " ".join(words[:13]).upper() + "!",
        "before " + "  ".join(words[3:]) + " after",
        "they asked: how many wizards are there, in the tower",
        " ".join(words[:12]) + " and on",
        "seven. Too few words. yes",
        "how many wizards are there in a tower",
    ]
    kept, counts = clean(texts, Cleaner(CleaningOptions(), evaluation=runs))
    assert kept == texts[3:]
    assert counts == {"num_contaminated": 3}


def test_what_the_tokenizer_would_change_is_counted_and_kept() -> None:
    tokenizer = Tokenizer(models.BPE())
    assert normalizer_changes(tokenizer) is None
    for normalizer, texts, changed in (
        (normalizers.NFC(), ["e\u0301", "é", "x", "\u1100\u1161"], 2),
        (normalizers.Lowercase(), ["Up", "down"], 1),
        (normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()]), ["ﬁ", " x", "y"], 2),
    ):
        tokenizer.normalizer = normalizer
        cleaner = Cleaner(CleaningOptions(), normalizer_changes(tokenizer))
        kept, counts = clean(texts, cleaner)
        assert (kept, counts) == (texts, {"num_changed_by_tokenizer": changed})
        assert sum(normalizer.normalize_str(text) != text for text in texts) == changed
