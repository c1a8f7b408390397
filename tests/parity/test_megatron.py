"""Pairs written here are read by megatron-core's own IndexedDataset, and the other way round, document for document."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambatrain.data.open_tokens import open_tokens
from mambatrain.data.token_shards import TokenShard, TokenShardWriter, token_dtype


@pytest.fixture(scope="module")
def megatron() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what it would like to be installed beside it
        return pytest.importorskip(
            "megatron.core.datasets.indexed_dataset",
            reason="megatron-core is not installed: the extra `dev` has it, where there is a wheel",
        )


def documents_of_megatron(megatron: Any, prefix: Path) -> list[list[int]]:
    dataset = megatron.IndexedDataset(str(prefix))
    bounds = dataset.document_indices.tolist()
    return [
        [token for sequence in range(first, last) for token in dataset[sequence].tolist()]
        for first, last in pairwise(bounds)
    ]


def documents_of_ours(shard: TokenShard) -> list[list[int]]:
    return [shard.document(index).tolist() for index in range(shard.num_documents)]


def test_a_folder_of_tokenize_is_read_by_megatron(megatron: Any, tiny_shards: Path) -> None:
    tokens = open_tokens(tiny_shards)
    for split, shard in tokens.shards.items():
        documents = documents_of_ours(shard)
        assert len(documents) > 2
        assert documents_of_megatron(megatron, tiny_shards / split) == documents


@pytest.mark.parametrize("vocab_size", [300, 100_000])
def test_a_pair_written_here_is_read_by_megatron(megatron: Any, tmp_path: Path, vocab_size: int) -> None:
    documents = [[5, 299, 0], [7], [vocab_size - 1, 0]]
    with TokenShardWriter(tmp_path / "a.b", token_dtype(vocab_size)) as writer:
        for document in documents:
            writer.append(np.array(document))
    assert documents_of_megatron(megatron, tmp_path / "a.b") == documents


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_a_pair_written_by_megatron_is_read_here(megatron: Any, tmp_path: Path, dtype: Any) -> None:
    import torch

    documents = [[[1, 2], [3, 0]], [[4, 0]], [[5], [6], [7, 0]]]  # of sequences
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    tokens = open_tokens(tmp_path)
    assert tokens.train.dtype == dtype
    assert tokens.train.end_id == 0
    assert documents_of_ours(tokens.train) == [[1, 2, 3, 0], [4, 0], [5, 6, 7, 0]]
