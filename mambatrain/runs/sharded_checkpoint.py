"""A checkpoint that all ranks write together, each its own file, without a collective.

Ranks tell each other how far they are through the store that they met in. So this may run in a thread beside training,
whose collectives it could otherwise cross.

    rank 0                                   the others
    makes the folder, says so                wait for it
    writes its file                          write theirs, say its size and digest (or what went wrong)
    hears all, writes the manifest,
    gives the folder its name, says so       wait for it
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mambatrain.errors import UserError
from mambatrain.files import explaining_full_disk
from mambatrain.runs.checkpoint import FileFacts, make_durable, writing_checkpoint
from mambatrain.runs.checkpoint_tensors import Part, write_shard
from mambatrain.runs.progress import Progress

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# All ranks write as much to the same disk: one that takes so much longer than another does not write any more.
SECONDS_FOR_ANOTHER_RANK = 900.0
_SECONDS_BETWEEN_LOOKS = 0.01
_numbers = itertools.count()


class Ranks:
    """What the ranks say to each other about one save. All of them make one at the same save, in the main thread."""

    def __init__(self, rank: int, num_ranks: int, store: Store) -> None:
        self.rank, self.num_ranks, self._store = rank, num_ranks, store

    @classmethod
    def of_this_run(cls) -> Self:
        """Those that have met, with a corner of their store for this save."""
        from torch.distributed import get_rank, get_world_size
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        store = PrefixStore(f"mambatrain-checkpoint-{next(_numbers)}", _get_default_store())
        return cls(get_rank(), get_world_size(), store)

    def say(self, what: str, content: Any) -> None:
        """Something that this rank is the only one to say."""
        self._store.set(f"{what}-{self.rank}", json.dumps(content))

    def hear(self, what: str, rank: int, seconds: float = SECONDS_FOR_ANOTHER_RANK) -> Any:
        """Waits until a rank has said it.

        Raises:
            UserError: it does not.
        """
        key, last = f"{what}-{rank}", time.monotonic() + seconds
        while not self._store.check([key]):  # `wait` would keep the store from the main thread
            if time.monotonic() > last:
                raise UserError(
                    f"process {rank} did not write its part of the checkpoint within {seconds:.0f} s",
                    "look at that machine and its disk; the same command continues from the checkpoint before",
                )
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return json.loads(self._store.get(key))


def save_sharded_checkpoint(
    checkpoints: Path,
    progress: Progress,
    parts: Mapping[str, Part],
    ranks: Ranks,
    log: Path | None = None,
) -> None:
    """Writes a checkpoint; every rank calls it with its own parts.

    Args:
        checkpoints: the run's folder of checkpoints, on a disk that all ranks see.
        progress: where the run is.
        parts: what this rank writes of parameters, optimizer tensors, and what else is needed to go on.
        ranks: made for this save.
        log: the file whose lines `progress` counts.

    Raises:
        UserError: the disk is full, for any of the ranks; earlier checkpoints are untouched.
    """
    if ranks.rank > 0:
        _write_beside(ranks, parts)
        return
    failure: list[str] | None = ["the checkpoint was not written", ""]
    try:
        with writing_checkpoint(checkpoints, progress, log) as (temporary, durable):
            ranks.say("folder", str(temporary))
            own = _try_to_write(temporary, 0, parts)
            # All of them, before any failure is raised: the folder is removed then, and nobody may still write into it.
            others = [ranks.hear("written", rank) for rank in range(1, ranks.num_ranks)]
            for said in (own, *others):
                if "failure" in said:
                    message, hint = said["failure"]
                    raise UserError(message, hint)
                durable |= said["files"]
        failure = None
    except UserError as error:
        failure = [error.message, error.hint or ""]
        raise
    finally:
        ranks.say("ended", failure)
        ranks.say("folder", None)  # for those who still wait for one


def _write_beside(ranks: Ranks, parts: Mapping[str, Part]) -> None:
    if (folder := ranks.hear("folder", 0)) is not None:
        ranks.say("written", _try_to_write(Path(folder), ranks.rank, parts))
    # Rank 0 may itself be waiting for one that hangs, which it will name.
    if (failure := ranks.hear("ended", 0, 2 * SECONDS_FOR_ANOTHER_RANK)) is not None:
        message, hint = failure
        raise UserError(message, hint)


def _try_to_write(folder: Path, rank: int, parts: Mapping[str, Part]) -> dict[str, Any]:
    try:
        with explaining_full_disk(f"checkpoint {folder.parent / folder.name.removeprefix('.writing-')}"):
            files: dict[str, FileFacts] = {file.name: make_durable(file) for file in write_shard(folder, rank, parts)}
            return {"files": files}
    except UserError as error:
        return {"failure": [error.message, error.hint or ""]}
    except Exception as error:
        return {"failure": [f"process {rank} could not write its part of the checkpoint: {error!r}", ""]}
