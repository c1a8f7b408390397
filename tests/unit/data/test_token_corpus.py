from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambatrain.data.manifest import TokenizeOptions
from mambatrain.data.token_corpus import open_token_corpus, verify_token_corpus
from mambatrain.data.tokenize_corpus import tokenize_corpus
from mambatrain.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "source.jsonl"
    source.write_text("".join(json.dumps({"text": f"the cat {n}"}) + "\n" for n in range(20)), encoding="utf-8")
    tokenize_corpus([source], byte_tokenizer, folder / "tokens", TokenizeOptions(held_out=0.2))
    return folder / "tokens"


@pytest.fixture
def tokens(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tokens"))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_token_corpus(folder)
    assert caught.value.hint is not None
    return caught.value.message


def edit_manifest(folder: Path, change: Callable[[Any], Any]) -> None:
    file = folder / "manifest.json"
    parts = json.loads(file.read_bytes())
    change(parts)
    file.write_text(json.dumps(parts), encoding="utf-8")


def test_an_intact_folder_opens_and_verifies(tokens: Path) -> None:
    corpus = open_token_corpus(str(tokens))
    assert (corpus.train.num_documents, corpus.held_out.num_documents) == (17, 5)
    assert corpus.train_bytes.shape == (17,)
    assert corpus.held_out_bytes.dtype == np.int64
    assert corpus.tokenizer_file == tokens / "tokenizer.json"
    assert corpus.end_of_document_id == 0
    assert corpus.vocab_size == corpus.train.vocab_size == corpus.held_out.vocab_size > 256
    verify_token_corpus(corpus)


def test_what_is_no_folder_of_tokens_is_told(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokns does not exist") as caught:
        open_token_corpus(tmp_path / "tokns")
    assert caught.value.hint == f"did you mean {tokens}?"
    assert refusal(tokens / "train.bin") == f"{tokens / 'train.bin'} is a file, not a folder of tokens"
    (tokens / "manifest.json").unlink()
    assert refusal(tokens) == f"{tokens} holds no manifest.json"


SHARD_FILES = [f"{split}.{ending}" for split in ("train", "held_out") for ending in ("bin", "idx", "bytes.npy")]
FILES = [*SHARD_FILES, "tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_truncated_file_is_named(tokens: Path, name: str) -> None:
    content = (tokens / name).read_bytes()
    (tokens / name).write_bytes(content[:-1])
    assert refusal(tokens).startswith(f"{tokens / name} has {len(content) - 1:,} bytes where the manifest says")
    (tokens / name).unlink()
    assert refusal(tokens) == f"{tokens / name} does not exist"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(tokens: Path, name: str) -> None:
    content = (tokens / name).read_bytes()
    for place in {0, len(content) // 2, len(content) - 1}:
        flipped = bytearray(content)
        flipped[place] ^= 1
        (tokens / name).write_bytes(flipped)
        with pytest.raises(UserError, match=str(tokens / name.partition(".")[0])):
            verify_token_corpus(open_token_corpus(tokens))
    (tokens / name).write_bytes(content)
    verify_token_corpus(open_token_corpus(tokens))


def test_every_changed_file_is_named(tokens: Path) -> None:
    corpus = open_token_corpus(tokens)
    for name in ("train.bin", "held_out.bin"):
        content = bytearray((tokens / name).read_bytes())
        content[4] ^= 1
        (tokens / name).write_bytes(content)
    message = f"{tokens / 'train.bin'}, {tokens / 'held_out.bin'}: not the bytes that were written"
    with pytest.raises(UserError, match=message):
        verify_token_corpus(corpus)


def test_shards_of_another_corpus_are_refused(tokens: Path) -> None:
    for name in ("bin", "idx"):
        (tokens / f"train.{name}").write_bytes((tokens / f"held_out.{name}").read_bytes())
        edit_manifest(tokens, lambda parts, name=name: parts["files"].update(
            {f"train.{name}": parts["files"][f"held_out.{name}"]}))  # fmt: skip
    assert "count tokens or documents differently" in refusal(tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.update(extra=1), "manifest.json is not a manifest that can be read: extra: "),
        (lambda parts: parts.update(version=2), "manifest.json is not a manifest that can be read: version: "),
        (lambda parts: parts["train"].update(num_tokens="9"), "can be read: train: num_tokens: "),
        (lambda parts: parts.pop("dtype"), "can be read: dtype: Field required"),
        (lambda parts: parts["train"].update(num_tokens=9), "count tokens or documents differently"),
        (lambda parts: parts["train"].update(num_bytes=9), "bytes.npy does not fit the documents of"),
        (lambda parts: parts["held_out"].update(num_documents=9), "count tokens or documents differently"),
        (lambda parts: parts.update(dtype="int32"), "ids of int32 do not fit its tokenizer's vocabulary"),
        (lambda parts: parts["tokenizer"].update(vocab_size=70_000), "ids of uint16 do not fit"),
        (lambda parts: parts["tokenizer"].update(vocab_size=0), "end-of-document token lies outside the vocabulary"),
        (lambda parts: parts["tokenizer"].update(end_of_document_id=1), "does not begin and end with"),
        (lambda parts: parts["tokenizer"].update(sha256="0" * 64), "is not the tokenizer that made these tokens"),
        (lambda parts: parts["files"].pop("train.idx"), "does not record the files"),
        (lambda parts: parts["files"].update({"../x": parts["files"]["train.idx"]}), "does not record the files"),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_fit_is_refused(tokens: Path, change: Callable[[Any], Any], message: str) -> None:
    edit_manifest(tokens, change)
    assert message in refusal(tokens)


def test_a_manifest_that_is_not_json_is_refused(tokens: Path) -> None:
    (tokens / "manifest.json").write_bytes((tokens / "manifest.json").read_bytes()[:-50])
    assert refusal(tokens).startswith(f"{tokens / 'manifest.json'} is not a manifest that can be read: Invalid JSON")


def test_pickles_are_not_loaded(tokens: Path) -> None:
    np.save(tokens / "train.bytes.npy", np.array([{}], dtype=object), allow_pickle=True)
    size = (tokens / "train.bytes.npy").stat().st_size
    edit_manifest(tokens, lambda parts: parts["files"]["train.bytes.npy"].update(num_bytes=size))
    assert "train.bytes.npy is damaged" in refusal(tokens)


def test_an_id_outside_the_vocabulary_is_told_when_it_is_read(tokens: Path) -> None:
    file = tokens / "train.bin"
    ids = np.fromfile(file, dtype="<u2")
    ids[3] = 60_000
    ids.tofile(file)
    with pytest.raises(UserError, match=r"train\.bin: token 3 has id 60000"):
        open_token_corpus(tokens).train.tokens(0, 10)
