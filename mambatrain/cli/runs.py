"""`runs`: the runs that are there, one of them in full, its digests, the mean of its checkpoints, archives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mambatrain.cli.plain_help import PlainCommand

runs_app = typer.Typer(no_args_is_help=True, help="List runs, show, verify, average and archive them.")

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]


@runs_app.command("list", cls=PlainCommand)
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where to look, three folders deep.")] = Path(
        "runs"
    ),
) -> None:
    """One line a run: model, step, tokens, held-out bits per byte, state, age of its log, size on disk.

    Example: mambatrain runs list
    """
    from mambatrain.cli.run_tables import run_table
    from mambatrain.runs.folder import RunFolder
    from mambatrain.runs.overview import find_runs, summarise_run

    summaries = [summarise_run(RunFolder(path)) for path in find_runs(folder)]
    if not summaries:
        typer.echo(f"no runs in {folder}", err=True)
        return
    for line in run_table(summaries, folder):
        print(line)
    for one in summaries:
        if one.problem is not None:
            typer.echo(f"warning  {one.path}: {one.problem}", err=True)


@runs_app.command(cls=PlainCommand)
def show(run: RunArgument) -> None:
    """Print where a run stands, its parameters, checkpoints, loss and recipe.

    Example: mambatrain runs show runs/demo
    """
    from mambatrain.cli.run_tables import run_lines
    from mambatrain.errors import UserError
    from mambatrain.runs.overview import open_run, summarise_run

    folder = open_run(run)
    summary = summarise_run(folder)
    if summary.problem is not None:
        raise UserError(summary.problem, "mambatrain writes the files of a run: restore what was changed")
    for line in run_lines(folder, summary):
        print(line)


@runs_app.command(cls=PlainCommand)
def verify(run: RunArgument) -> None:
    """Compare every file of every checkpoint with its digest; name each that is damaged. Exit code 1.

    Example: mambatrain runs verify runs/demo
    """
    from mambatrain.errors import UserError
    from mambatrain.runs.checkpoint import damages_of, list_checkpoints
    from mambatrain.runs.overview import open_run

    folder = open_run(run)
    checkpoints = list_checkpoints(folder.path)
    damaged = 0
    for checkpoint in checkpoints:
        damages = list(damages_of(checkpoint))
        damaged += bool(damages)
        print(f"{checkpoint.name}  {'damaged' if damages else 'whole'}")
        for damage in damages:
            print(f"  {damage}")
    if not checkpoints:
        print("no checkpoints yet")
    if damaged:
        whole = len(checkpoints) - damaged
        hint = "restore the files, or go on: a run resumes from its newest whole checkpoint"
        raise UserError(
            f"{damaged} of {len(checkpoints)} checkpoints of {run} are damaged",
            hint if whole else "restore the files, or begin again with --fresh",
        )


@runs_app.command(cls=PlainCommand)
def average(
    run: RunArgument,
    last: Annotated[
        int,
        typer.Option("--last", min=2, metavar="K", help="Checkpoints, counted from the newest.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder of weights.", show_default=False)],
) -> None:
    """Write the mean of the last K checkpoints' weights; `evaluate`, `finetune --from` and `export` take the folder.

    Example: mambatrain runs average runs/demo --last 3 --out runs/demo-average
    """
    import sys

    from mambatrain.runs.average import average_checkpoints
    from mambatrain.runs.overview import open_run

    done = average_checkpoints(open_run(run), last, out)
    print(f"averaged {', '.join(checkpoint.name for checkpoint in done.checkpoints)}", file=sys.stderr)
    print(done.folder)


TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="Any fsspec URL (s3://bucket/demo), or a folder.", show_default=False)
]


@runs_app.command(cls=PlainCommand)
def archive(
    run: RunArgument,
    target: TargetArgument,
    checkpoints: Annotated[
        Literal["newest", "best", "all"], typer.Option("--checkpoints", help="Which of them.")
    ] = "newest",
) -> None:
    """Copy a run's files and checkpoints under a URL and read them back; what is whole there is not copied again.

    Example: mambatrain runs archive runs/demo s3://bucket/demo
    """
    import sys

    from mambatrain.runs.archive import archive_run
    from mambatrain.runs.overview import open_run

    done = archive_run(open_run(run), target, checkpoints)
    print(f"copied {done}", file=sys.stderr)
    print(target)


@runs_app.command(cls=PlainCommand)
def fetch(
    target: TargetArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The new run folder.", show_default=False)],
) -> None:
    """Make a run folder from an archive; every file is compared with its digest.

    Example: mambatrain runs fetch s3://bucket/demo runs/demo
    """
    import sys

    from mambatrain.runs.archive import fetch_run

    print(f"copied {fetch_run(target, folder)}", file=sys.stderr)
    print(folder)
