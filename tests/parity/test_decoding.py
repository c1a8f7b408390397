"""Real text of 567 languages and old Chinese comes back from its tokens; golden tokens of llama.cpp are met.

Every eighth document here; `python tests/long/decode_all.py` takes all of every corpus.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from mambatrain.data.manifest import TokenizerSettings
from mambatrain.data.pretokenizers import make_pretokenizer
from mambatrain.data.tokenizer import LoadedTokenizer, load_tokenizer
from mambatrain.data.train_tokenizer import train_tokenizer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NEOX = DATA / "tokenizers" / "gpt_neox_20b" / "20B_tokenizer.json"
CORPORA = ("tldr_multilingual", "udhr_multilingual", "tang_poems_zh")

pytestmark = pytest.mark.skipif(not NEOX.is_file(), reason="the texts and the tokenizer of ../shared/data are not here")


@pytest.fixture(scope="module", params=["GPT-NeoX", "gpt-2", "llama-bpe"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedTokenizer:
    """GPT-NeoX's, and two that are trained here."""
    if request.param == "GPT-NeoX":
        return load_tokenizer(NEOX)
    file = tmp_path_factory.mktemp("trained") / "tokenizer.json"
    settings = TokenizerSettings(vocab_size=2000, sample_bytes=300_000, pretokenizer=request.param)
    train_tokenizer([DATA / "pretrain" / f"{CORPORA[0]}.jsonl.gz"], file, settings)
    return load_tokenizer(file)


@pytest.mark.parametrize("name", CORPORA)
def test_every_document_comes_back_as_the_normalizer_left_it(name: str, tokenizer: LoadedTokenizer) -> None:
    with gzip.open(DATA / "pretrain" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for number, line in enumerate(lines) if number % 8 == 0]
    normalizer = tokenizer.tokenizer.normalizer
    wanted = [normalizer.normalize_str(text) for text in texts] if normalizer is not None else texts
    decoded = [tokenizer.decode(ids.tolist()) for ids in tokenizer.encode_batch(texts)]
    assert len(texts) > 60
    assert [number for number, (got, want) in enumerate(zip(decoded, wanted, strict=True)) if got != want] == []


def test_gpt2_gives_the_golden_tokens() -> None:
    """llama.cpp's cases for its `gpt-2`, with GPT-2's vocabulary and merges and the pre-tokenizer made here."""
    folder = DATA / "tokenizers"
    files = (str(folder / "gpt2" / "encoder.json"), str(folder / "gpt2" / "vocab.bpe"))
    tokenizer = Tokenizer(models.BPE.from_file(*files))
    tokenizer.pre_tokenizer = make_pretokenizer("gpt-2")
    cases = folder / "ggml_vocab" / "ggml-vocab-gpt-2.gguf.inp"
    texts = cases.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    golden = [[int(part) for part in line.split()] for line in cases.with_suffix(".out").read_text().splitlines()]
    assert [encoding.ids for encoding in tokenizer.encode_batch(texts)][: len(golden)] == golden
    assert len(golden) > 40
