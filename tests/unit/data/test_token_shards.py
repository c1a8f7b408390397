from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambatrain.data.token_shards import TokenShard, TokenShardWriter, token_dtype
from mambatrain.errors import UserError

DOCUMENTS = st.lists(st.lists(st.integers(0, 65_534), max_size=9), max_size=8)


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 65_535) -> Path:
    with TokenShardWriter(prefix, token_dtype(vocab_size)) as writer:
        for document in documents:
            writer.append(np.array(document, dtype=np.int64))
    return prefix


def megatron_index(code: int, lengths: list[int], item_bytes: int, documents: list[int]) -> bytes:
    """The index as Megatron's documentation has it, field by field."""
    pointers, place = [], 0
    for length in lengths:
        pointers.append(place)
        place += length * item_bytes
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(documents)}q", *documents)
    )


@given(documents=DOCUMENTS, vocab_size=st.sampled_from([65_535, 65_536]))
def test_what_is_written_is_megatrons_format_and_reads_back(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab_size: int
) -> None:
    prefix = write(tmp_path_factory.mktemp("shard") / "a.b", documents, vocab_size)
    flat = [token for document in documents for token in document]
    code, item, letter = (8, 2, "H") if vocab_size == 65_535 else (4, 4, "i")
    assert prefix.with_name("a.b.bin").read_bytes() == struct.pack(f"<{len(flat)}{letter}", *flat)
    lengths = [len(document) for document in documents]
    expected = megatron_index(code, lengths, item, list(range(len(documents) + 1)))
    assert prefix.with_name("a.b.idx").read_bytes() == expected

    shard = TokenShard(prefix, vocab_size)
    assert (shard.num_documents, shard.num_tokens, shard.dtype.itemsize) == (len(documents), len(flat), item)
    assert shard.document_lengths.tolist() == lengths
    assert shard.document_starts.dtype == shard.document_lengths.dtype == np.int64
    read = [
        shard.tokens(start, start + length).tolist()
        for start, length in zip(shard.document_starts.tolist(), lengths, strict=True)
    ]
    assert read == documents


def test_ids_take_two_bytes_while_they_fit() -> None:
    assert token_dtype(65_535) == np.uint16
    assert token_dtype(65_536) == np.int32


def test_documents_of_several_sequences_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(np.arange(10, dtype="<i8").tobytes())
    (tmp_path / "m.idx").write_bytes(megatron_index(5, [2, 3, 1, 4], 8, [0, 2, 2, 4]))
    shard = TokenShard(tmp_path / "m")
    assert shard.document_starts.tolist() == [0, 5, 5]
    assert shard.document_lengths.tolist() == [5, 0, 5]
    assert shard.tokens(5, 10).tolist() == [5, 6, 7, 8, 9]


def test_tokens_are_a_view_and_a_span_outside_is_an_error(tmp_path: Path) -> None:
    shard = TokenShard(write(tmp_path / "a", [[1, 2], [3]]))
    assert shard.tokens(0, 3).base is not None
    assert shard.tokens(3, 3).tolist() == []
    for start, stop in ((-1, 2), (2, 1), (0, 4)):
        with pytest.raises(IndexError):
            shard.tokens(start, stop)


def test_an_id_outside_the_vocabulary_is_refused_where_it_stands(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 2, 3, 9, 4]])
    assert TokenShard(prefix, vocab_size=10).tokens(0, 5).tolist() == [1, 2, 3, 9, 4]
    shard = TokenShard(prefix, vocab_size=9)
    assert shard.tokens(0, 3).tolist() == [1, 2, 3]
    with pytest.raises(UserError, match=r"a\.bin: token 3 has id 9, beyond the 9 of the tokenizer"):
        shard.tokens(2, 5)
    negative = write(tmp_path / "b", [[1, -1]], vocab_size=70_000)
    with pytest.raises(UserError, match="token 1 has id -1"):
        TokenShard(negative, vocab_size=70_000).tokens(0, 2)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    for ending in (".bin", ".idx"):
        prefix = write(tmp_path / "a", [[1, 2, 3], [4]])
        file = tmp_path / f"a{ending}"
        whole = file.read_bytes()
        for length in range(len(whole)):
            file.write_bytes(whole[:length])
            with pytest.raises(UserError) as caught:
                TokenShard(prefix)
            assert caught.value.message.startswith(str(file))
        file.unlink()
        with pytest.raises(UserError, match="does not exist"):
            TokenShard(prefix)


def test_every_flipped_bit_of_an_index_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 2, 3], [4], []])
    index = tmp_path / "a.idx"
    whole = index.read_bytes()
    survivors = []
    for place in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        index.write_bytes(flipped)
        try:
            TokenShard(prefix)
        except UserError as error:
            assert str(tmp_path / "a") in error.message
        else:
            survivors.append(place)
    # Two flips move a document's end to that of a neighbour, which is an index too: digests are there for these.
    entries = (len(whole) - 4 * 8) * 8
    assert survivors == [entries + 64, entries + 2 * 64]


def test_float_ids_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f.bin").write_bytes(b"\0" * 8)
    (tmp_path / "f.idx").write_bytes(megatron_index(7, [2], 4, [0, 1]))
    with pytest.raises(UserError, match="the ids are float32, not whole numbers"):
        TokenShard(tmp_path / "f")


def test_a_block_that_fails_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TokenShardWriter(tmp_path / "a", token_dtype(10)) as writer:
        writer.append(np.array([1]))
        raise RuntimeError
    assert not (tmp_path / "a.idx").exists()
    assert (tmp_path / "a.bin").read_bytes() == b"\1\0"  # closed, not left to the garbage collector


def test_a_full_disk_shows_as_itself(tmp_path: Path) -> None:
    (tmp_path / "a.bin").symlink_to("/dev/full")
    for count in (1, 2_000_000):  # within the buffer, and beyond it
        with pytest.raises(OSError, match="No space left"), TokenShardWriter(tmp_path / "a", token_dtype(10)) as writer:
            writer.append(np.zeros(count, dtype=np.int64))


def test_a_document_longer_than_the_format_holds_is_refused(tmp_path: Path) -> None:
    class Long(np.ndarray[Any, Any]):
        def __len__(self) -> int:
            return 2**31

    with TokenShardWriter(tmp_path / "a", token_dtype(10)) as writer:
        with pytest.raises(UserError, match=r"2,147,483,648 tokens, more than the 2,147,483,647"):
            writer.append(np.zeros(1, dtype=np.int64).view(Long))
        assert writer.num_documents == 0


def mapped_bytes() -> int:
    """Pages of files that this process has in memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"RssFile:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is told by Linux alone")
def test_a_pass_over_a_large_shard_takes_no_memory(tmp_path: Path) -> None:
    num_documents, length = 4096, 65_536  # half a gigabyte of zeros, which take no room on the disk
    with (tmp_path / "s.bin").open("wb") as file:
        file.truncate(num_documents * length * 2)
    (tmp_path / "s.idx").write_bytes(megatron_index(8, [length] * num_documents, 2, list(range(num_documents + 1))))
    shard = TokenShard(tmp_path / "s", vocab_size=10)
    view = shard.tokens(0, 4)
    before = mapped_bytes()
    for index in range(num_documents):
        assert not shard.document(index).any()
        assert index % 256 or mapped_bytes() - before < 150e6
    assert not shard.last_ids(np.arange(num_documents)).any()
    assert mapped_bytes() - before < 150e6
    assert view.tolist() == [0, 0, 0, 0]  # still there to be read
