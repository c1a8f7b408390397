"""`slurm`: a batch script for a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambatrain.cli.train import RunOption, SequenceOption, SetOption, ShardOption


def slurm(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, metavar="N", help="Machines.")] = 1,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, metavar="N", help="GPUs of each machine. [default: 8]")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, metavar="N", help="Instead of GPUs: CPU processes of each.")
    ] = None,
    time: Annotated[str, typer.Option("--time", metavar="D-HH:MM:SS", help="Time limit of one job.")] = "24:00:00",
    seconds_to_save: Annotated[
        int,
        typer.Option(
            "--seconds-to-save", min=30, metavar="N", help="How long before the limit the run is told to save."
        ),
    ] = 300,
    run: RunOption = None,
    overrides: SetOption = None,
    shard: ShardOption = "no",
    sequence: SequenceOption = 1,
    options: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="OPTION", help="One more line for sbatch, e.g. --sbatch=--partition=gpu."),
    ] = None,
) -> None:
    """Print a batch script that trains a recipe, saves before its time is over, and queues itself again.

    Example: mambatrain slurm mamba1-1.4b --nodes 4 --shard full --time 12:00:00 > job.sh && sbatch job.sh
    """
    from mambatrain.errors import UserError
    from mambatrain.planning.batch_script import BatchJob, write_batch_script
    from mambatrain.recipe import read_recipe
    from mambatrain.training.sharding import num_shards

    if gpus and processes:
        raise UserError("--gpus and --processes exclude each other", "--processes is for CPUs")
    per_node = gpus or processes or 8
    num_shards(shard, nodes * per_node, per_node)  # refuses what would be refused when the job has waited for its turn
    rows = read_recipe(recipe, overrides).rows_per_step
    if nodes * per_node % sequence or rows % (nodes * per_node // sequence):
        shared = "" if sequence == 1 else f", {sequence} to a row"
        raise UserError(
            f"{rows} rows a step do not divide into {nodes} x {per_node} processes{shared}",
            "--set training.rows_per_step to a multiple, or ask for another number",
        )
    folder = run or Path("runs") / Path(recipe).stem
    job = BatchJob(
        recipe=recipe,
        run=folder,
        nodes=nodes,
        gpus=None if processes else per_node,
        processes=per_node,
        time=time,
        seconds_to_save=seconds_to_save,
        overrides=tuple(overrides or ()),
        shard=shard,
        sequence=sequence,
        options=tuple(options or ()),
    )
    print(write_batch_script(job), end="")
