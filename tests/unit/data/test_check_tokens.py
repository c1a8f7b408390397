from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mambatrain.data import check_tokens as module
from mambatrain.data.check_tokens import MAX_NAMED, check_tokens
from mambatrain.data.open_tokens import open_tokens
from mambatrain.data.token_shards import TokenShardWriter
from mambatrain.files import sha256_of


@pytest.fixture
def tokens(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "tokens"))


def found(where: Path, vocab_size: int | None = None) -> list[str]:
    checked = check_tokens(open_tokens(where), vocab_size)
    assert checked.num_problems >= len(checked.problems)
    return [str(problem).replace(f"{where}/", "") for problem in checked.problems]


def change(folder: Path, places: dict[int, int], mend_digest: bool = True) -> None:
    """Other ids at some places of train.bin; the manifest goes along, as when the fault was there from the start."""
    file = folder / "train.bin"
    ids = np.fromfile(file, dtype="<u2")
    for place, token in places.items():
        ids[place] = token
    ids.tofile(file)
    if mend_digest:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        manifest["files"]["train.bin"]["sha256"] = sha256_of(file)
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_tokenize_wrote_is_right(tokens: Path) -> None:
    checked = check_tokens(open_tokens(tokens))
    assert (checked.problems, checked.num_problems, checked.not_checked) == ((), 0, ())


def test_a_changed_byte_is_told_by_its_digest(tokens: Path) -> None:
    place = int(open_tokens(tokens).train.document_starts[2]) + 1
    before = int(np.fromfile(tokens / "train.bin", dtype="<u2")[place])
    change(tokens, {place: before + 1 if before < 500 else before - 1}, mend_digest=False)
    assert found(tokens) == ["train.bin: not the bytes that were written: its digest is another"]


def test_an_id_outside_the_vocabulary_is_named_by_document(tokens: Path) -> None:
    start = int(open_tokens(tokens).train.document_starts[3])
    change(tokens, {start + 5: 600, start + 9: 700})
    assert found(tokens) == ["train.bin, document 3: its token 5 has id 600; the vocabulary has 512"]


def test_a_smaller_vocabulary_can_be_asked_for(tokens: Path) -> None:
    ids = np.fromfile(tokens / "train.bin", dtype="<u2")
    assert found(tokens, vocab_size=int(ids.max()) + 1) == []
    assert any("the vocabulary has 400" in line for line in found(tokens, vocab_size=400))


def test_a_document_that_does_not_end_is_named(tokens: Path) -> None:
    shard = open_tokens(tokens).train
    last = int(shard.document_starts[2] + shard.document_lengths[2]) - 1
    change(tokens, {last: 7})
    assert found(tokens) == ["train.bin, document 2: ends in id 7, not in the end token 0"]


def test_an_end_token_within_a_document_is_named(tokens: Path) -> None:
    start = int(open_tokens(tokens).train.document_starts[1])
    change(tokens, {start + 4: 0, start + 8: 0})
    assert found(tokens) == ["train.bin, document 1: holds the end token 0 within, at its token 4"]


def test_chunks_make_no_difference(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = open_tokens(tokens).train
    start, last = int(shard.document_starts[1]), int(shard.document_starts[3]) - 1
    change(tokens, {start + 4: 0, start + 40: 0, start + 50: 600, start + 90: 601, last: 3})
    whole = found(tokens)
    assert len(whole) == 3
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 7)
    assert found(tokens) == whole


def test_problems_beyond_the_first_are_counted(tmp_path: Path) -> None:
    with TokenShardWriter(tmp_path / "p", np.dtype("<i4")) as writer:
        for _ in range(50):
            writer.append(np.array([-1, 0]))
    checked = check_tokens(open_tokens(tmp_path))
    assert (len(checked.problems), checked.num_problems) == (MAX_NAMED, 50)
    assert str(checked.problems[0]).endswith("document 0: its token 0 has id -1; none is negative")


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    with TokenShardWriter(tmp_path / "p", np.dtype("<u2")) as writer:
        for document in ([1, 2], [], [3]):
            writer.append(np.array(document))
    checked = check_tokens(open_tokens(tmp_path))
    assert checked.num_problems == 0
    assert checked.not_checked == (
        "digests: there is no manifest",
        "the vocabulary: its size is not known; --vocab-size names it",
        "end tokens: the documents have none",
    )
    assert check_tokens(open_tokens(tmp_path), vocab_size=3).num_problems == 1


def test_an_empty_document_among_ended_ones_is_named(tmp_path: Path) -> None:
    with TokenShardWriter(tmp_path / "p", np.dtype("<u2")) as writer:
        for document in ([1, 0], [], [3, 0]):
            writer.append(np.array(document))
    assert found(tmp_path / "p", 4) == [f"{tmp_path / 'p'}.bin, document 1: is empty, not in the end token 0"]
