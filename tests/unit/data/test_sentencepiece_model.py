"""Models of SentencePiece against its own library; the models are trained here, by it."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from mambatrain.data import sentencepiece_model as module
from mambatrain.data.manifest import TokenizeOptions
from mambatrain.data.token_corpus import open_token_corpus
from mambatrain.data.tokenize_corpus import tokenize_corpus
from mambatrain.data.tokenizer import load_tokenizer
from mambatrain.errors import UserError

sentencepiece = pytest.importorskip("sentencepiece", reason="the sentencepiece package is not installed")

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
TINY = DATA / "tokenizers" / "tiny_sp" / "torchtune_m.model"

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "it's",
    "naïve",
    "—",
    "12,345",
    "“quoted”",
    "Привет",
    "名前はまだ無い。",
    "x=f(y)",
    "e\u0301",
]


def train(file: Path, **options: Any) -> Path:
    words = random.Random(0)
    texts = [" ".join(words.choice(WORDS) for _ in range(20)) for _ in range(400)]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=made,
        vocab_size=400,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    file.write_bytes(made.getvalue())
    return file


KINDS = {
    "unigram": {"model_type": "unigram"},
    "unigram, as Llama's": {
        "model_type": "unigram",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "bpe, as Llama's": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "bpe": {"model_type": "bpe"},
    "no prefix": {
        "model_type": "bpe",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<tag>"],
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_its_own_library(kind: str, tmp_path: Path) -> None:
    file = train(tmp_path / "m.model", **KINDS[kind])
    own = sentencepiece.SentencePieceProcessor(model_file=str(file))
    loaded = load_tokenizer(file)
    assert loaded.end_of_document == "</s>"
    assert loaded.vocab_size == len(own)
    words = random.Random(1)
    texts = [" ".join(words.choice([*WORDS, "<tag>", " ", "\n", "zzz", "😀"]) for _ in range(30)) for _ in range(200)]
    ids = [row.tolist() for row in loaded.encode_batch(texts)]
    assert ids == own.encode(texts)
    assert [loaded.decode(row) for row in ids[:20]] == own.decode(ids[:20]) or "unk" in "".join(map(loaded.decode, ids))


def test_a_corpus_keeps_a_tokenizer_that_gives_the_same_tokens(tmp_path: Path) -> None:
    file = train(tmp_path / "m.model", **KINDS["bpe, as Llama's"])
    (tmp_path / "a.txt").write_text("the cat sat on naïve", encoding="utf-8")
    done = tokenize_corpus([tmp_path / "a.txt"], file, tmp_path / "out", TokenizeOptions())
    corpus = open_token_corpus(tmp_path / "out")
    kept = load_tokenizer(corpus.tokenizer_file)
    assert kept.sha256 == done.corpus.manifest.tokenizer.sha256
    assert kept.decode(corpus.train.tokens(1, corpus.train.num_tokens - 1).tolist()) == "the cat sat on naïve"
    assert tokenize_corpus([tmp_path / "a.txt"], file, tmp_path / "out", TokenizeOptions()).reused


@pytest.mark.skipif(not TINY.is_file(), reason="the model of ../shared/data is not here")
def test_a_model_of_another_project_on_real_text_of_many_languages() -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(TINY))
    with gzip.open(DATA / "pretrain" / "tldr_multilingual.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines][::40]
    ids = [row.tolist() for row in load_tokenizer(TINY).encode_batch(texts)]
    assert ids == own.encode(texts)


def test_what_cannot_be_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="is not a model of SentencePiece"):
        load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(UserError, match="is neither a unigram nor a BPE model"):
        load_tokenizer(train(tmp_path / "c.model", model_type="char"))
    with pytest.raises(UserError, match="for 'a <tag> b<tag>c' SentencePiece gives"):
        load_tokenizer(train(tmp_path / "t.model", model_type="bpe", user_defined_symbols=["<tag>"]))
    file = train(tmp_path / "m.model", model_type="bpe")
    monkeypatch.setattr(module, "_merges", lambda model: [])
    with pytest.raises(UserError, match=r"for '.*' SentencePiece gives \[.*\], the converted tokenizer \["):
        load_tokenizer(file)
