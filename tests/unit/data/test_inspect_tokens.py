from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambatrain.data.inspect_tokens import inspect_tokens, length_histogram, length_summary, sample_documents
from mambatrain.data.open_tokens import open_tokens
from mambatrain.data.token_shards import TokenShardWriter

DOCUMENTS = st.lists(st.lists(st.integers(1, 3), max_size=3), max_size=20)


def write(prefix: Path, documents: list[list[int]], opening: bool = True) -> None:
    with TokenShardWriter(prefix, np.dtype("<u2")) as writer:
        for document in ([[]] if opening else []) + documents:
            writer.append(np.array([*document, 0]))


@given(train=DOCUMENTS.filter(lambda documents: len(documents) > 1), held_out=DOCUMENTS)
def test_counts_are_those_of_plain_python(
    tmp_path_factory: pytest.TempPathFactory, train: list[list[int]], held_out: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    write(folder / "train", train)
    write(folder / "held_out", held_out)
    reports = inspect_tokens(open_tokens(folder))
    for split, documents in (("train", train), ("held_out", held_out)):
        counts = Counter(map(tuple, documents))
        report = reports[split]
        assert report.num_documents == len(documents)
        assert report.num_empty == counts[()]
        assert report.num_tokens == sum(map(len, documents)) + len(documents)
        assert report.num_text_tokens == sum(map(len, documents))
        assert report.num_duplicates == len(documents) - len(counts)
        assert report.num_duplicate_groups == sum(count > 1 for count in counts.values())
        assert report.lengths.tolist() == list(map(len, documents))
        assert report.bytes_per_token is None
    known = set(map(tuple, train))
    assert reports["train"].num_also_in_train == 0
    assert reports["held_out"].num_also_in_train == sum(tuple(document) in known for document in held_out)


def test_documents_without_an_end_token_count_whole(tmp_path: Path) -> None:
    with TokenShardWriter(tmp_path / "p", np.dtype("<u2")) as writer:
        for document in ([1, 2], [3], [1, 2], [4]):
            writer.append(np.array(document))
    report = inspect_tokens(open_tokens(tmp_path))["train"]
    assert (report.num_documents, report.num_tokens, report.num_text_tokens) == (4, 6, 6)
    assert (report.num_duplicates, report.num_duplicate_groups) == (1, 1)


def test_bytes_per_token_leaves_end_tokens_out(tiny_shards: Path) -> None:
    tokens = open_tokens(tiny_shards)
    report = inspect_tokens(tokens)["train"]
    assert tokens.train_bytes is not None
    assert report.num_bytes == int(tokens.train_bytes.sum())
    text_tokens = tokens.train.num_tokens - tokens.train.num_documents
    assert report.bytes_per_token == pytest.approx(report.num_bytes / text_tokens)


@given(lengths=st.lists(st.integers(0, 5000), max_size=50))
def test_the_histogram_counts_every_document_once(lengths: list[int]) -> None:
    edges, counts = length_histogram(np.array(lengths, dtype=np.int64))
    assert len(edges) == len(counts) + 1
    assert counts.sum() == len(lengths)
    for first, below, count in zip(edges, edges[1:], counts, strict=False):
        assert sum(first <= length < below for length in lengths) == count
    if lengths:
        assert counts[0] > 0
        assert counts[-1] > 0


def test_the_summary() -> None:
    assert length_summary(np.array([], dtype=np.int64)) == {}
    summary = length_summary(np.arange(101))
    assert (summary["min"], summary["mean"], summary["p50"], summary["p95"], summary["max"]) == (0, 50, 50, 95, 100)


def test_samples_are_documents_of_text_without_repetition(tmp_path: Path) -> None:
    write(tmp_path / "train", [[1], [2], [3]])
    shard = open_tokens(tmp_path).train
    assert sorted(sample_documents(shard, 9)) == [1, 2, 3]
    assert len(sample_documents(shard, 2)) == 2
    write(tmp_path / "none", [])
    assert sample_documents(open_tokens(tmp_path / "none").train, 2) in ([], [0])
