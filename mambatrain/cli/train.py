"""`pretrain` and `finetune`: one loop, two starting points."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mambatrain.launch import RANK_TIMEOUT_SECONDS

if TYPE_CHECKING:
    from mambatrain.recipe import Recipe
    from mambatrain.runs.weights import Weights


class Kernels(StrEnum):
    """The keys of `ops.backends.BACKENDS`, which cannot be imported for --help."""

    auto = "auto"
    native = "native"
    torch = "torch"
    reference = "reference"
    mamba_ssm = "mamba-ssm"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Tracker(StrEnum):
    none = "none"
    wandb = "wandb"


RunOption = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", help="Run folder. [default: runs/NAME of the recipe]", show_default=False),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Override one setting of the recipe, e.g. --set optimizer.learning_rate=1e-3; repeatable.",
    ),
]
GpusOption = Annotated[
    int | None, typer.Option("--gpus", min=1, metavar="N", help="Start one process for each of N GPUs of this machine.")
]
ProcessesOption = Annotated[
    int | None, typer.Option("--processes", min=1, metavar="N", help="Start N processes on the CPU.")
]
NodesOption = Annotated[
    int,
    typer.Option("--nodes", min=1, metavar="N", help="Machines on which this same command is run, --gpus on each."),
]
RendezvousOption = Annotated[
    str | None,
    typer.Option("--rendezvous", metavar="HOST:PORT", help="Where several nodes meet: one of them, and a free port."),
]
ShardOption = Annotated[
    str,
    typer.Option(
        "--shard",
        metavar="no|full|node|N",
        help="Divide weights, gradients and optimizer state over all processes (full), over those of each machine "
        "(node), or over groups of N; no: every process holds a copy. The model that comes out is the same.",
    ),
]
RankTimeoutOption = Annotated[
    float,
    typer.Option(
        "--rank-timeout",
        min=1,
        metavar="SECONDS",
        help="With several processes: when none has moved for so long, the one that hangs is named and all end.",
    ),
]
SequenceOption = Annotated[
    int,
    typer.Option(
        "--sequence",
        min=1,
        metavar="N",
        help="N neighbouring processes share each row: rows too long for one device. The model is the same.",
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto: CUDA where there is a device.")]
KernelsOption = Annotated[
    Kernels, typer.Option("--kernels", help="Which operators run; what cannot run is refused, never replaced.")
]
ResumeOption = Annotated[
    bool | None,
    typer.Option(
        "--resume/--fresh",
        help="--resume: only continue. --fresh: move an earlier run aside and begin. "
        "Default: continue a run of the same recipe, else begin.",
        show_default=False,
    ),
]
TrackerOption = Annotated[
    Tracker, typer.Option("--tracker", help="Also log to Weights & Biases (offline without a key).")
]
BranchOption = Annotated[
    Path | None,
    typer.Option(
        "--branch-from",
        metavar="CHECKPOINT",
        help="Go on from a checkpoint (RUN/checkpoints/step-...) of another run, with its recipe as --set changes it.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]


@dataclass(frozen=True)
class Launch:
    """How many processes a command is to become."""

    gpus: int | None
    processes: int | None
    nodes: int
    rendezvous: str | None
    shard: str
    sequence: int
    rank_timeout: float
    device: Device

    def is_asked(self) -> bool:
        """Whether this process, or the launcher that it comes from, is to start others.

        Raises:
            UserError: the options do not go together.
        """
        import re

        from mambatrain.errors import UserError

        if self.gpus and self.processes:
            raise UserError("--gpus and --processes exclude each other", "--processes is for CPUs")
        if (self.gpus and self.device is Device.cpu) or (self.processes and self.device is Device.cuda):
            asked = f"--gpus {self.gpus}" if self.gpus else f"--processes {self.processes}"
            raise UserError(f"{asked} and --device {self.device} exclude each other", "leave --device out")
        if self.nodes > 1 and not (self.gpus or self.processes):
            raise UserError(f"--nodes {self.nodes} does not say how many processes each has", "add --gpus N")
        if (self.nodes > 1) != (self.rendezvous is not None):
            raise UserError("--nodes and --rendezvous HOST:PORT belong together", "HOST is one of the nodes")
        if self.rendezvous is not None and not re.fullmatch(r".+:\d{1,5}", self.rendezvous):
            raise UserError(f"--rendezvous {self.rendezvous} is not HOST:PORT", "for example node1:29500")
        return bool(self.gpus or self.processes)

    def refuse_other_launcher(self) -> None:
        """
        Raises:
            UserError: a launcher that is not ours has started another number of processes than is asked for.
        """
        import os

        from mambatrain.errors import UserError

        asked, started = self.gpus or self.processes, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if asked is not None and asked != started:
            raise UserError(
                f"{asked} processes are asked for, and the launcher started {started}",
                "leave --gpus, --processes and --nodes out where torchrun or accelerate launch starts the processes",
            )

    def start(self, folder: Path) -> NoReturn:
        """Runs this very command line once per device; the workers see that they are workers."""
        import sys

        from mambatrain.launch import launch_workers
        from mambatrain.runs.folder import RunFolder

        if self.gpus:
            from mambatrain.devices import refuse_missing_gpus

            refuse_missing_gpus(self.gpus)
        count = self.gpus or self.processes or 1
        marker = RunFolder(folder).stopped_marker
        raise typer.Exit(launch_workers(sys.argv[1:], count, marker, self.nodes, self.rendezvous))


def pretrain(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
    ] = None,
    run: RunOption = None,
    branch_from: BranchOption = None,
    overrides: SetOption = None,
    gpus: GpusOption = None,
    processes: ProcessesOption = None,
    nodes: NodesOption = 1,
    rendezvous: RendezvousOption = None,
    shard: ShardOption = "no",
    sequence: SequenceOption = 1,
    rank_timeout: RankTimeoutOption = RANK_TIMEOUT_SECONDS,
    device: DeviceOption = Device.auto,
    kernels: KernelsOption = Kernels.auto,
    resume: ResumeOption = None,
    tracker: TrackerOption = Tracker.none,
    quiet: QuietOption = False,
) -> None:
    """Train a model from its initialisation. Ctrl-C or SIGTERM saves and ends with 75; the same command continues.

    Example: mambatrain pretrain demo --run runs/demo --set training.total_tokens=2_000_000
    """
    from mambatrain.errors import UserError
    from mambatrain.recipe import read_recipe

    if branch_from is not None:
        if recipe is not None or run is None:
            raise UserError(
                "--branch-from takes the recipe of the run it branches from, and a folder of its own",
                "mambatrain pretrain --branch-from CHECKPOINT --run DIR --set schedule.kind=wsd ...",
            )
        from mambatrain.runs.branch import run_of

        recipe = str(run_of(branch_from).recipe_file)
    elif recipe is None:
        raise UserError("there is no RECIPE", "`mambatrain recipes list` names the shipped ones")
    read = read_recipe(recipe, overrides)
    launch = Launch(gpus, processes, nodes, rendezvous, shard, sequence, rank_timeout, device)
    _train(read, recipe, None, run, launch, kernels, resume, tracker, quiet, branch_from)


def finetune(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")],
    weights: Annotated[
        str,
        typer.Option("--from", metavar="WEIGHTS", help="A run, a transformers or mamba-ssm folder, or a hub name."),
    ],
    run: RunOption = None,
    overrides: SetOption = None,
    gpus: GpusOption = None,
    processes: ProcessesOption = None,
    nodes: NodesOption = 1,
    rendezvous: RendezvousOption = None,
    shard: ShardOption = "no",
    sequence: SequenceOption = 1,
    rank_timeout: RankTimeoutOption = RANK_TIMEOUT_SECONDS,
    device: DeviceOption = Device.auto,
    kernels: KernelsOption = Kernels.auto,
    resume: ResumeOption = None,
    tracker: TrackerOption = Tracker.none,
    quiet: QuietOption = False,
) -> None:
    """Continue training from weights on the recipe's data; the recipe may leave its model section out.

    Example: mambatrain finetune continue --from demo/run --set data.shards=my/shards --run runs/continued
    """
    from mambatrain.adapters.open_weights import open_weights
    from mambatrain.cli.open_model import warn_of_damage
    from mambatrain.recipe import read_recipe

    start = open_weights(weights)
    warn_of_damage(start)
    read = read_recipe(recipe, overrides, model=start.section)
    launch = Launch(gpus, processes, nodes, rendezvous, shard, sequence, rank_timeout, device)
    _train(read, recipe, start, run, launch, kernels, resume, tracker, quiet)


def _train(
    recipe: Recipe,
    name: str,
    weights: Weights | None,
    run: Path | None,
    launch: Launch,
    kernels: Kernels,
    resume: bool | None,
    tracker: Tracker,
    quiet: bool,
    branch_from: Path | None = None,
) -> None:
    from mambatrain.launch import is_worker

    folder = run or Path("runs") / Path(name).stem
    if launch.is_asked():
        if not is_worker():
            launch.start(folder)
        launch.refuse_other_launcher()
    from mambatrain.training.stop import StopRequest

    with StopRequest() as stop:  # around the heavy imports: a signal during them asks, too
        from mambatrain.devices import end_processes
        from mambatrain.training.assemble import Where
        from mambatrain.training.start import run_training

        chosen: Any = "cuda" if launch.gpus else "cpu" if launch.processes else launch.device.value
        where = Where(chosen, kernels.value, tracker.value, quiet, launch.shard, launch.sequence, launch.rank_timeout)
        mode: Any = {None: "if-possible", True: "required", False: "fresh"}[resume]
        exit_code = run_training(recipe, folder, where, mode, stop, weights, branch_from)
        end_processes()
    # torchrun turns every worker's code into 1: one that stopped as asked leaves a marker in the run and ends with 0
    raise typer.Exit(0 if is_worker() else exit_code)
