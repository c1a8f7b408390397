"""Real text of 567 languages and old Chinese comes back from its shards; golden tokens of llama.cpp are met.

Every eighth document here; `python tests/long/decode_all.py` takes all of every corpus.
"""

from __future__ import annotations

import gzip
import json
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from mambatrain.data.manifest import TokenizeOptions, TokenizerSettings
from mambatrain.data.pretokenizers import make_pretokenizer
from mambatrain.data.tokenize_corpus import tokenize_corpus
from mambatrain.data.tokenizer import load_tokenizer
from mambatrain.data.train_tokenizer import train_tokenizer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NEOX = DATA / "tokenizers" / "gpt_neox_20b" / "20B_tokenizer.json"
GOLDEN = DATA / "tokenizers" / "ggml_vocab"
CORPORA = ("tldr_multilingual", "udhr_multilingual", "tang_poems_zh")
EVERY = 8

pytestmark = pytest.mark.skipif(not NEOX.is_file(), reason="the texts and the tokenizer of ../shared/data are not here")


@pytest.fixture(scope="module", params=["GPT-NeoX", "gpt-2", "llama-bpe"])
def tokenizer_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-NeoX's, which normalizes to NFC, and two that are trained here and do not."""
    if request.param == "GPT-NeoX":
        return NEOX
    file = tmp_path_factory.mktemp("trained") / "tokenizer.json"
    settings = TokenizerSettings(vocab_size=2000, sample_bytes=300_000, pretokenizer=request.param)
    train_tokenizer([DATA / "pretrain" / f"{CORPORA[0]}.jsonl.gz"], file, settings)
    return file


@pytest.mark.parametrize("name", CORPORA)
def test_every_document_comes_back_as_the_normalizer_left_it(name: str, tokenizer_file: Path, tmp_path: Path) -> None:
    with gzip.open(DATA / "pretrain" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        chosen = [line for number, line in enumerate(lines) if number % EVERY == 0]
    (tmp_path / "part.jsonl").write_text("".join(chosen), encoding="utf-8")
    texts = [json.loads(line)["text"] for line in chosen]
    wanted = [unicodedata.normalize("NFC", text) for text in texts] if tokenizer_file == NEOX else texts

    options = TokenizeOptions(held_out=0.1)
    corpus = tokenize_corpus([tmp_path / "part.jsonl"], tokenizer_file, tmp_path / "out", options).corpus
    loaded = load_tokenizer(corpus.tokenizer_file)
    decoded: Counter[str] = Counter()
    for shard in (corpus.train, corpus.held_out):
        for number in range(1, shard.num_documents):
            *ids, end = shard.document(number).tolist()
            assert end == loaded.end_of_document_id
            decoded[loaded.decode(ids)] += 1
    assert len(texts) > 60
    assert decoded == Counter(wanted)
    num_changed = sum(text != want for text, want in zip(texts, wanted, strict=True))
    assert corpus.manifest.num_changed_by_tokenizer == num_changed
    assert (num_changed > 0) == (tokenizer_file == NEOX and name != "tang_poems_zh")


def golden_cases(name: str) -> tuple[list[str], list[list[int]]]:
    """Texts and their tokens, as llama.cpp keeps them for its own tests of a vocabulary."""
    cases = GOLDEN / f"ggml-vocab-{name}.gguf.inp"
    texts = cases.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    golden = [[int(part) for part in line.split()] for line in cases.with_suffix(".out").read_text().splitlines()]
    assert len(golden) > 40
    assert len(texts) - len(golden) in (0, 1)  # the file may end in a separator
    return texts[: len(golden)], golden


def test_gpt2_gives_the_golden_tokens() -> None:
    """llama.cpp's cases for its `gpt-2`, with GPT-2's vocabulary and merges and the pre-tokenizer made here."""
    folder = DATA / "tokenizers" / "gpt2"
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    tokenizer.pre_tokenizer = make_pretokenizer("gpt-2")
    texts, golden = golden_cases("gpt-2")
    assert [encoding.ids for encoding in tokenizer.encode_batch(texts)] == golden


def test_gpt_neox_gives_the_golden_tokens() -> None:
    """MPT's tokenizer is GPT-NeoX's; encoded as `tokenize` does it."""
    texts, golden = golden_cases("mpt")
    assert [ids.tolist() for ids in load_tokenizer(NEOX).encode_batch(texts)] == golden
