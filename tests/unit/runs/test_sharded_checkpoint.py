"""What ranks say to each other about a save, over the store they met in; tests/distributed saves whole models."""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from mambatrain.errors import UserError
from mambatrain.runs import sharded_checkpoint
from mambatrain.runs.checkpoint_tensors import Part, write_shard
from mambatrain.runs.progress import Progress
from mambatrain.runs.sharded_checkpoint import Ranks, save_sharded_checkpoint


@pytest.mark.parametrize("failing", [0, 1])
def test_a_folder_is_not_removed_while_a_rank_still_writes_into_it(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, said, was_there, has_ended = HashStore(), dict[int, str](), list[bool](), threading.Event()

    def save(rank: int) -> None:
        parts = {f"w{rank}": Part(torch.ones(3), (0,))}
        with pytest.raises(UserError) as raised:
            save_sharded_checkpoint(tmp_path, Progress(step=1), parts, Ranks(rank, 2, store))
        said[rank] = raised.value.message
        if rank == failing:
            has_ended.set()

    def write(folder: Path, rank: int, parts: Mapping[str, Part]) -> list[Path]:
        if rank == failing:
            raise OSError(errno.ENOSPC, "no space left")
        has_ended.wait(0.5)  # in vain: the one that failed waits for this rank, however long it takes
        was_there.append(folder.is_dir())
        return write_shard(folder, rank, parts)

    monkeypatch.setattr(sharded_checkpoint, "write_shard", write)
    threads = [threading.Thread(target=save, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert was_there == [True]
    assert said[0] == said[1] == f"the disk is full: checkpoint {tmp_path / 'step-00000001'} was not written"
    assert list(tmp_path.iterdir()) == []
