"""Which rank has which part of which rows, and what does not go with that."""

from __future__ import annotations

from typing import Any

import pytest

from mambatrain.errors import UserError
from mambatrain.recipe import Recipe, parse_recipe
from mambatrain.training.resolve import resolve
from mambatrain.training.sequence import RowShare, refuse_with_sequence, share_of_rank

MAMBA2 = {"block": "mamba2", "d_model": 8, "num_layers": 1, "vocab_size": 512, "head_dim": 4}


def recipe_of(rows_per_step: int = 4, **sections: Any) -> Recipe:
    content = {
        "model": {"d_model": 8, "num_layers": 1, "vocab_size": 512},
        "data": {"shards": "nowhere", "row_tokens": 32},
        "training": {"rows_per_step": rows_per_step, "total_steps": 4, "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-3},
    }
    return parse_recipe(content | sections, "a test")


def test_neighbours_share_rows_and_groups_have_their_own() -> None:
    shares = [share_of_rank(3, rank, 6) for rank in range(6)]
    assert [(share.group, share.part) for share in shares] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert {(share.num_groups, share.num_parts) for share in shares} == {(2, 3)}
    assert share_of_rank(1, 1, 4) == RowShare(group=1, num_groups=4)


@pytest.mark.parametrize(("num_parts", "num_processes"), [(2, 1), (3, 4), (4, 2)])
def test_what_does_not_divide_the_processes_is_refused(num_parts: int, num_processes: int) -> None:
    with pytest.raises(UserError, match=rf"--sequence {num_parts}: {num_processes} process.*groups of {num_parts}"):
        share_of_rank(num_parts, 0, num_processes)


def test_rows_must_divide_into_groups_not_into_processes() -> None:
    def micro_batch_rows(rows: int) -> int:
        share = share_of_rank(2, 0, 4)
        return resolve(recipe_of(rows), None, "fp32", 2**30, share, shards=1).micro_batch_rows

    assert micro_batch_rows(2) == 1
    with pytest.raises(UserError, match="3 rows a step do not divide into 2 groups of 2 processes that share rows"):
        micro_batch_rows(3)


def test_what_does_not_go_with_shared_rows_is_refused_by_name() -> None:
    refuse_with_sequence(recipe_of(), 4, shards=1, kernels="torch")
    with pytest.raises(UserError, match="--sequence 4 does not go with --shard"):
        refuse_with_sequence(recipe_of(), 4, shards=2, kernels="torch")
    with pytest.raises(UserError, match=r"--sequence 4 does not go with adapter\.kind state"):
        refuse_with_sequence(recipe_of(adapter={"kind": "state"}), 4, shards=1, kernels="torch")
    with pytest.raises(UserError, match="--sequence 4: rows of 3 tokens do not have a token for each process"):
        refuse_with_sequence(recipe_of(data={"shards": "nowhere", "row_tokens": 3}), 4, shards=1, kernels="torch")
    refuse_with_sequence(recipe_of(model=MAMBA2), 4, shards=1, kernels="mamba-ssm")
    with pytest.raises(UserError, match="--sequence 4 does not go with --kernels mamba-ssm"):
        refuse_with_sequence(recipe_of(), 4, shards=1, kernels="mamba-ssm")
