"""One process of a launch: runs cases `[{recipe, run, resume, shard, sequence, weights, ...}]` of a JSON file in turn.

Starting processes is what costs time, so a launch of one world size runs all cases.
"""

import json
import os
import resource
import shutil
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from mambatrain.devices import end_processes
from mambatrain.errors import UserError
from mambatrain.recipe import read_recipe
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.runs.weights import read_weights
from mambatrain.training import resolve, start
from mambatrain.training.assemble import Where
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest


def fail_on_a_full_disk(case: dict[str, str], where: Where) -> None:
    """What each rank says goes into RUN.error-RANK, what the folder of checkpoints holds then into RUN.left."""
    run, rank = Path(case["run"]), int(os.environ["RANK"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(case["largest_file_of_rank_1"]), limits[1]))
    try:
        run_training(read_recipe(case["recipe"]), run, where, case["resume"], StopRequest())
    except UserError as error:
        run.with_name(f"{run.name}.error-{rank}").write_text(error.message)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torch.distributed.barrier()
    if rank == 0:
        run.with_name(f"{run.name}.left").write_text("\n".join(path.name for path in (run / "checkpoints").iterdir()))


torch.set_num_threads(1)
start.draw_loss = start.draw_preferences = lambda *_: False  # the others would wait for each picture
for case in json.loads(Path(sys.argv[1]).read_text()):
    place = {"shard": case.get("shard", "no"), "sequence": case.get("sequence", 1)}
    where = Where(device="cpu", kernels="torch", quiet=True, **place)
    if "origin" in case:  # goes on from the first checkpoint of a run that this launch may just have made
        if int(os.environ["RANK"]) == 0:
            shutil.copytree(case["origin"], case["run"])
            for checkpoint in list_checkpoints(Path(case["run"]))[1:]:
                shutil.rmtree(checkpoint)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    if "free_bytes" in case:  # of each rank
        free_bytes = case["free_bytes"][int(os.environ["RANK"])]
        resolve.memory_of_process = lambda _, free_bytes=free_bytes: free_bytes
    AcceleratorState._reset_state()  # precisions differ from case to case
    if "largest_file_of_rank_1" in case:
        fail_on_a_full_disk(case, where)
        continue
    weights = read_weights(case["weights"]) if "weights" in case else None
    recipe = read_recipe(case["recipe"], model=None if weights is None else weights.section)
    assert run_training(recipe, Path(case["run"]), where, case["resume"], StopRequest(), weights) == 0
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    assert world == int(os.environ["EXPECTED_WORLD_SIZE"]), f"{world} processes joined"
end_processes()
