from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambatrain.data.manifest import CleaningOptions, TokenizeOptions
from mambatrain.data.shuffle_documents import num_held_out
from mambatrain.data.token_corpus import DATA_FILES, TokenCorpus, verify_token_corpus
from mambatrain.data.tokenize_corpus import HowToRead, tokenize_corpus
from mambatrain.data.tokenizer import LoadedTokenizer, load_tokenizer
from mambatrain.errors import UserError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
TEXTS = [
    f"document {number} says é and 漢\r\nover {'several ' * (number % 7)}\n lines<|endoftext|>" for number in range(60)
]


def write_source(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "corpus.jsonl", TEXTS)


def documents_of(corpus: TokenCorpus, loaded: LoadedTokenizer) -> tuple[list[str], list[str]]:
    """The texts of both shards in their order; the layout is checked on the way."""
    both = []
    for shard, text_bytes in ((corpus.train, corpus.train_bytes), (corpus.held_out, corpus.held_out_bytes)):
        texts = []
        for number in range(shard.num_documents):
            start = int(shard.document_starts[number])
            ids = shard.tokens(start, start + int(shard.document_lengths[number])).tolist()
            assert ids[-1] == loaded.end_of_document_id
            assert loaded.end_of_document_id not in ids[:-1]
            texts.append(loaded.decode(ids[:-1]))
            assert text_bytes[number] == len(texts[-1].encode())
        assert texts[0] == ""
        assert int(shard.document_lengths.sum()) == shard.num_tokens
        both.append(texts[1:])
    return both[0], both[1]


def snapshot(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_every_document_comes_back_once_and_the_last_of_the_order_are_held_out(
    source: Path, byte_tokenizer: Path, tmp_path: Path
) -> None:
    done = tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions(held_out=0.1))
    assert not done.reused
    train, held_out = documents_of(done.corpus, load_tokenizer(byte_tokenizer))
    assert (len(train), len(held_out)) == (54, 6)
    assert sorted(train + held_out) == sorted(TEXTS)
    assert train + held_out != TEXTS
    manifest = done.corpus.manifest
    assert (manifest.train.num_documents, manifest.held_out.num_documents) == (54, 6)
    assert manifest.train.num_bytes + manifest.held_out.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.train.num_tokens == done.corpus.train.num_tokens
    assert manifest.sources[0].sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert manifest.dtype == "uint16"
    assert done.corpus.tokenizer_file.read_bytes() == byte_tokenizer.read_bytes()
    verify_token_corpus(done.corpus)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*DATA_FILES, "manifest.json"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus.jsonl", "out"]


@settings(max_examples=25)
@given(
    piece=st.sampled_from([5, 30, 4096]),
    how=st.builds(HowToRead, num_workers=st.integers(1, 4), batch_characters=st.integers(1, 5000)),
)
def test_the_bytes_do_not_depend_on_batches_and_threads(
    tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Path, piece: int, how: HowToRead
) -> None:
    folder = tmp_path_factory.mktemp("batches")
    source = write_source(folder / "corpus.jsonl", TEXTS)
    options = TokenizeOptions(held_out=0.05, seed=3)
    tokenize_corpus([source], byte_tokenizer, folder / "one", options)
    with pytest.MonkeyPatch.context() as patch:  # small pieces: documents go on over several batches
        patch.setattr("mambatrain.data.tokenizer.PIECE_CHARACTERS", piece)
        tokenize_corpus([source], byte_tokenizer, folder / "other", options, how=how)
    assert snapshot(folder / "one") == snapshot(folder / "other")


def test_the_order_follows_the_seed_alone(source: Path, byte_tokenizer: Path, tmp_path: Path) -> None:
    loaded = load_tokenizer(byte_tokenizer)
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = tokenize_corpus([source], byte_tokenizer, tmp_path / name, TokenizeOptions(seed=seed))
        train, held_out = documents_of(done.corpus, loaded)
        orders.append([TEXTS.index(text) for text in train + held_out])
    assert orders[0] == orders[1] != orders[2]
    # Written down: with another version of NumPy or of this program the folder must not become another.
    assert orders[0][:6] == [42, 19, 8, 41, 50, 23]


@pytest.mark.parametrize(
    ("documents", "fraction", "wanted"),
    [(1, 0.5, 0), (2, 0.01, 1), (2, 0.0, 0), (100, 0.01, 1), (101, 0.01, 2), (100, 0.07, 7), (100, 0.29, 29),
     (3, 0.999, 2), (1_000_000, 0.001, 1000), (10, 1e-9, 1)],
)  # fmt: skip
def test_how_many_are_held_out(documents: int, fraction: float, wanted: int) -> None:
    assert num_held_out(documents, fraction) == wanted


def test_one_document_is_trained_on_and_the_held_out_shard_is_its_opening_token(
    byte_tokenizer: Path, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "one.jsonl", ["alone"])
    corpus = tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions()).corpus
    assert documents_of(corpus, load_tokenizer(byte_tokenizer)) == (["alone"], [])
    assert corpus.held_out.tokens(0, 1).tolist() == [0]
    assert corpus.held_out_bytes.tolist() == [0]


def test_all_kinds_of_sources_go_into_one_corpus(byte_tokenizer: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "a.txt").write_bytes("\ufeffmarked\r\n".encode())
    (folder / "b.md").write_text("# head", encoding="utf-8")
    (folder / "c.py").write_bytes("# coding: latin-1\nx = 'é'".encode("latin-1"))
    write_source(folder / "d.jsonl", ["line one", "line two"])
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    pq.write_table(pa.table({"text": ["row"]}), folder / "f.parquet")
    (folder / "g.csv").write_text("x", encoding="utf-8")
    done = tokenize_corpus([folder], byte_tokenizer, tmp_path / "out", TokenizeOptions(held_out=0.0))
    train, held_out = documents_of(done.corpus, load_tokenizer(byte_tokenizer))
    assert held_out == []
    wanted = ["marked\r\n", "# head", "# coding: latin-1\nx = 'é'", "line one", "line two", "packed", "row"]
    assert sorted(train) == sorted(wanted)
    assert done.unread == (folder / "g.csv",)
    assert [Path(record.file).name[0] for record in done.corpus.manifest.sources] == list("abcdef")


def test_empty_and_bad_documents_are_counted(byte_tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "mixed.jsonl"
    source.write_bytes(b'{"text": ""}\n{"text": "x"}\n{"text": " \\n\\u00a0"}\n{"text": "\xff"}\n{"text": "y"}\n')
    with pytest.raises(UserError, match=r"mixed\.jsonl:4 is not UTF-8"):
        tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mixed.jsonl"]
    done = tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions(skip_bad=True))
    assert done.bad == (f"{source}:4 is not UTF-8: invalid start byte (byte 0xff)",)
    manifest = done.corpus.manifest
    assert (manifest.num_skipped_empty, manifest.num_skipped_bad) == (2, 1)
    assert manifest.train.num_documents + manifest.held_out.num_documents == 2


def test_of_documents_with_the_same_text_the_first_is_kept(byte_tokenizer: Path, tmp_path: Path) -> None:
    texts = [f"text {number * number % 23}" for number in range(100)]
    source = write_source(tmp_path / "a.jsonl", texts)
    once = write_source(tmp_path / "once.jsonl", list(dict.fromkeys(texts)))
    options = TokenizeOptions(cleaning=CleaningOptions(deduplicate=True))
    tokenize_corpus([source], byte_tokenizer, tmp_path / "out", options)
    corpus = tokenize_corpus([once], byte_tokenizer, tmp_path / "wanted", TokenizeOptions()).corpus
    out, wanted = snapshot(tmp_path / "out"), snapshot(tmp_path / "wanted")
    assert [out[name] for name in DATA_FILES] == [wanted[name] for name in DATA_FILES]
    assert corpus.manifest.train.num_documents + corpus.manifest.held_out.num_documents == len(set(texts))


def test_a_corpus_without_text_is_refused(byte_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text("no\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"hold no text \(files: 2, empty documents: 1, unreadable ones: 1\)") as caught:
        options = TokenizeOptions(skip_bad=True)
        tokenize_corpus([tmp_path / "empty.txt", tmp_path / "bad.jsonl"], byte_tokenizer, tmp_path / "out", options)
    assert caught.value.hint is not None
    assert "bad.jsonl:1 is not JSON" in caught.value.hint
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.jsonl", "empty.txt"]


def test_an_end_token_that_a_text_can_spell_is_refused(byte_tokenizer: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", ["fine", "oh!"])
    with pytest.raises(UserError, match=r"a\.jsonl:2 holds ! as text, and the tokenizer takes it for the token"):
        tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions(), end_of_document="!")
    assert not (tmp_path / "out").exists()


def test_a_large_vocabulary_takes_four_bytes(source: Path, byte_tokenizer: Path, tmp_path: Path) -> None:
    parts = json.loads(byte_tokenizer.read_bytes())
    parts["model"]["vocab"]["far"] = 65_535
    (tmp_path / "large.json").write_text(json.dumps(parts), encoding="utf-8")
    corpus = tokenize_corpus([source], tmp_path / "large.json", tmp_path / "out", TokenizeOptions()).corpus
    assert (corpus.vocab_size, corpus.manifest.dtype, corpus.train.dtype) == (65_536, "int32", np.int32)
    train, held_out = documents_of(corpus, load_tokenizer(tmp_path / "large.json"))
    assert sorted(train + held_out) == sorted(TEXTS)


@pytest.mark.skipif(not DATA.is_dir(), reason="the books of ../shared/data are not here")
def test_real_books_come_back_as_their_own_bytes(tmp_path: Path) -> None:
    """GPT-NeoX normalises to NFC, so that a text comes back as its NFC form."""
    import unicodedata

    wanted = []
    with gzip.open(DATA / "pretrain" / "tldr_multilingual.jsonl.gz", "rt", encoding="utf-8") as lines:
        for _, line in zip(range(3000), lines, strict=False):
            wanted.append(json.loads(line)["text"])
    source = write_source(tmp_path / "some.jsonl", wanted)
    tokenizer = DATA / "tokenizers" / "gpt_neox_20b" / "20B_tokenizer.json"
    corpus = tokenize_corpus([source], tokenizer, tmp_path / "out", TokenizeOptions()).corpus
    loaded = load_tokenizer(tokenizer)
    read = [
        loaded.decode(shard.tokens(int(start) + 0, int(start) + int(length) - 1).tolist())
        for shard in (corpus.train, corpus.held_out)
        for start, length in zip(shard.document_starts, shard.document_lengths, strict=True)
    ]
    assert sorted(read) == sorted([unicodedata.normalize("NFC", text) for text in wanted] + ["", ""])
    total = int(corpus.train_bytes.sum() + corpus.held_out_bytes.sum())
    assert total == sum(len(text.encode()) for text in wanted)
