from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from mambatrain.data.open_tokens import find_end_id, open_tokens
from mambatrain.data.token_shards import TokenShard, TokenShardWriter
from mambatrain.errors import UserError


def write_pair(prefix: Path, documents: list[list[int]]) -> Path:
    """A pair as any other tool writes it: fields packed one by one, no code of ours."""
    places = np.cumsum([0, *map(len, documents)])
    prefix.with_name(prefix.name + ".bin").write_bytes(
        struct.pack(f"<{places[-1]}i", *[token for document in documents for token in document])
    )
    count = len(documents)
    prefix.with_name(prefix.name + ".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 4, count, count + 1)
        + struct.pack(f"<{count}i", *map(len, documents))
        + struct.pack(f"<{count}q", *(4 * places[:-1]))
        + struct.pack(f"<{count + 1}q", *range(count + 1))
    )
    return prefix


def documents_of(shard: TokenShard) -> list[list[int]]:
    return [shard.document(index).tolist() for index in range(shard.num_documents)]


def test_a_folder_of_tokenize_opens_with_all_that_its_manifest_knows(tiny_shards: Path) -> None:
    tokens = open_tokens(tiny_shards)
    assert tokens.corpus is not None
    assert list(tokens.shards) == ["train", "held_out"]
    assert tokens.vocab_size == 512
    assert tokens.train.end_id == tokens.corpus.end_of_document_id
    assert tokens.train.ends_marked
    assert tokens.train.num_opening == 1
    assert tokens.text_bytes("held_out") is tokens.held_out_bytes is not None
    assert tokens.digest == tokens.corpus.digest


@pytest.mark.parametrize("name", ["p", "p.bin", "p.idx", ""])
def test_a_bare_pair_is_named_by_prefix_by_either_file_or_by_its_folder(tmp_path: Path, name: str) -> None:
    documents = [[1, 2, 9], [3, 9]]
    write_pair(tmp_path / "p", documents)
    tokens = open_tokens(tmp_path / name)
    assert documents_of(tokens.train) == documents
    assert tokens.where == tmp_path / name
    assert (tokens.held_out, tokens.train_bytes, tokens.tokenizer_file, tokens.vocab_size) == (None, None, None, None)


def test_a_prefix_with_dots_is_found(tmp_path: Path) -> None:
    write_pair(tmp_path / "gpt2.v1_text", [[1], [2]])
    assert open_tokens(tmp_path / "gpt2.v1_text").train.num_tokens == 2
    assert open_tokens(tmp_path).train.num_tokens == 2


@pytest.mark.parametrize(
    ("documents", "end_id"),
    [
        ([[1, 2, 9], [3, 9]], 9),
        ([[9], [1, 9]], 9),
        ([[1, 9], [], [2, 9]], 9),  # an empty document ends in nothing
        ([[1, 2, 9], [3, 8]], None),
        ([[1, 2, 9]], None),  # one document says nothing
        ([[1, 2, 9], []], None),
        ([], None),
    ],
)
def test_the_end_token_is_read_off_the_documents(
    tmp_path: Path, documents: list[list[int]], end_id: int | None
) -> None:
    shard = open_tokens(write_pair(tmp_path / "p", documents)).train
    assert shard.end_id == end_id
    assert shard.ends_marked == (end_id is not None)


def test_held_out_documents_that_agree_by_chance_have_no_end_token(tmp_path: Path) -> None:
    write_pair(tmp_path / "train", [[1, 2], [3, 4], [5, 6]])
    write_pair(tmp_path / "held_out", [[1, 7], [2, 7]])
    tokens = open_tokens(tmp_path)
    assert tokens.held_out is not None
    assert find_end_id(tokens.held_out) == 7
    assert (tokens.held_out.end_id, tokens.held_out.ends_marked) == (None, False)


def test_ids_beyond_the_vocabulary_are_refused_as_they_are_read(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "p", [[1, 70, 0], [2, 0]])
    assert open_tokens(prefix).train.tokens(0, 2).tolist() == [1, 70]
    with pytest.raises(UserError, match="token 1 has id 70, beyond the 64"):
        open_tokens(prefix, vocab_size=64).train.tokens(0, 2)


def test_the_digest_tells_pairs_apart(tmp_path: Path) -> None:
    pairs = {
        "as it is": [[1, 2, 9], [3, 9]],
        "another id": [[1, 4, 9], [3, 9]],
        "another cut": [[1, 2], [9, 3, 9]],
        "longer": [[1, 2, 9], [3, 9], [9]],
    }
    digests = {open_tokens(write_pair(tmp_path / name, documents)).digest for name, documents in pairs.items()}
    assert len(digests) == len(pairs)
    assert open_tokens(write_pair(tmp_path / "again", pairs["as it is"])).digest in digests


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no manifest\.json and no \.bin/\.idx pair"):
        open_tokens(tmp_path)
    write_pair(tmp_path / "alpha", [[1]])
    write_pair(tmp_path / "beta", [[1]])
    with pytest.raises(UserError, match=r"holds 2 \.bin/\.idx pairs: alpha, beta") as caught:
        open_tokens(tmp_path)
    assert caught.value.hint == f"name one, for example {tmp_path / 'alpha'}"
    with pytest.raises(UserError, match="bata does not exist") as caught:
        open_tokens(tmp_path / "bata")
    assert "beta" in str(caught.value.hint)
    (tmp_path / "beta.idx").unlink()
    with pytest.raises(UserError, match=r"beta\.idx does not exist"):
        open_tokens(tmp_path / "beta")


def test_what_a_writer_of_ours_writes_without_a_manifest_is_a_bare_pair(tmp_path: Path) -> None:
    with TokenShardWriter(tmp_path / "train", np.dtype("<u2")) as writer:
        for document in ([0], [4, 5, 0], [6, 0]):
            writer.append(np.array(document))
    tokens = open_tokens(tmp_path)
    assert (tokens.train.end_id, tokens.train.num_opening) == (0, 1)
