"""`plan`: what a recipe costs, before anything starts."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from mambatrain.cli.plain_help import within
from mambatrain.cli.train import Kernels, KernelsOption, SequenceOption, SetOption, ShardOption

if TYPE_CHECKING:
    from mambatrain.planning.plan import Place
    from mambatrain.recipe import Recipe

DEFAULT_UTILISATION = 0.3


class Gpu(StrEnum):
    auto = "auto"
    h200 = "h200"
    h100 = "h100"
    a100_80 = "a100-80"
    l40s = "l40s"
    rtx4090 = "4090"
    cpu = "cpu"


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, metavar="N", help="Devices in all; with cpu, processes.")] = 1,
    gpu: Annotated[
        Gpu, typer.Option("--gpu", help="Which device. auto: one of this machine if it is listed, else its CPU.")
    ] = Gpu.auto,
    gpus_per_node: Annotated[
        int, typer.Option("--gpus-per-node", min=1, metavar="N", help="What `--shard node` divides the model over.")
    ] = 8,
    shard: ShardOption = "no",
    sequence: SequenceOption = 1,
    overrides: SetOption = None,
    kernels: KernelsOption = Kernels.auto,
    utilisation: Annotated[
        float,
        typer.Option(
            "--utilisation",
            metavar="FRACTION",
            help="Model FLOPs a second over the device's peak: an assumption, which the time follows from.",
            callback=within(lambda fraction: 0.0 < fraction <= 1.0, "above 0 and at most 1"),
        ),
    ] = DEFAULT_UTILISATION,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Also build one rank of the divided model without memory, run a step, and count what it holds and "
            "sends; needs --shard.",
        ),
    ] = False,
    json_wanted: Annotated[bool, typer.Option("--json", help="Write the plan as JSON.")] = False,
) -> None:
    """Say what a recipe costs before it starts: parameters, FLOPs, memory by part, time, disk, and whether it fits.

    Example: mambatrain plan mamba2-370m --gpus 8 --gpu h100
    """
    import json

    from mambatrain.cli.plan_table import dry_run_lines, plan_lines
    from mambatrain.errors import UserError
    from mambatrain.planning.plan import make_plan
    from mambatrain.recipe import read_recipe

    read = read_recipe(recipe, overrides)
    place = find_place(read, gpus, gpu.value, gpus_per_node, shard, sequence, kernels.value, utilisation)
    if dry_run and place.shards == 1:
        raise UserError("--dry-run divides a model over ranks, and --shard does not say how", "add --shard full")
    made = make_plan(read, place)
    content, lines = made.as_json(), list(plan_lines(recipe, read, place, made))
    if dry_run:
        from mambatrain.planning.dry_run import run_dry

        counted = run_dry(
            read.recomputing(made.recompute_every), place, made.micro_batch_rows, made.micro_batches_per_step
        )
        content["dry_run"] = counted.as_json()
        lines += dry_run_lines(counted)
    print(json.dumps(content, indent=2) if json_wanted else "\n".join(lines))


def find_place(
    recipe: Recipe, gpus: int, gpu: str, gpus_per_node: int, shard: str, sequence: int, kernels: str, utilisation: float
) -> Place:
    """The device, its precision, and the operators that would run on it."""
    import torch

    from mambatrain.devices import resolve_precision
    from mambatrain.ops.backends import choose_backend
    from mambatrain.planning.hardware import GPUS, native_on_gpus, this_cpu, this_gpu
    from mambatrain.planning.plan import Place
    from mambatrain.training.build import parameter_dtype
    from mambatrain.training.eight_bit_adamw import refuse_eight_bit
    from mambatrain.training.sequence import refuse_with_sequence
    from mambatrain.training.sharding import num_shards, refuse_with_shards

    shards = num_shards(shard, gpus, min(gpus, gpus_per_node))
    if shards > 1:
        refuse_with_shards(recipe, shard)
    if sequence > 1:
        refuse_with_sequence(recipe, sequence, shards, kernels)
    device, cpu, asked = this_gpu() if gpu == "auto" else GPUS.get(gpu), torch.device("cpu"), recipe.training.precision
    if device is None:
        refuse_eight_bit(recipe, cpu)
        precision = resolve_precision(asked, cpu)
        backend = choose_backend(kernels, cpu, parameter_dtype(precision))
        return Place(this_cpu(precision), True, gpus, shards, precision, backend, utilisation, sequence)
    backend = native_on_gpus() if kernels in ("auto", "native") else choose_backend(kernels, torch.device("cuda"))
    return Place(device, False, gpus, shards, "bf16" if asked == "auto" else asked, backend, utilisation, sequence)
