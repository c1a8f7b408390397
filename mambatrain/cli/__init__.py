"""The command line. Each command imports what it needs when it runs: `--help` loads nothing heavy.

Exit codes: 0 done, 1 error, 2 usage, 75 stopped as asked and resumable, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import typer

from mambatrain import __version__
from mambatrain.cli.chat import chat
from mambatrain.cli.data import data_app
from mambatrain.cli.doctor import doctor
from mambatrain.cli.evaluate import evaluate
from mambatrain.cli.export import export
from mambatrain.cli.generate import generate
from mambatrain.cli.kernels import kernels_app
from mambatrain.cli.plain_help import PlainCommand
from mambatrain.cli.plan import plan
from mambatrain.cli.recipes import recipes_app
from mambatrain.cli.runs import runs_app
from mambatrain.cli.slurm import slurm
from mambatrain.cli.state import state_app
from mambatrain.cli.tokenizer import tokenizer_app
from mambatrain.cli.tokens import tokenize
from mambatrain.cli.train import finetune, pretrain
from mambatrain.errors import UserError
from mambatrain.files import FULL_DISK
from mambatrain.launch import EXIT_INTERRUPTED

SECONDS_BEFORE_OTHER_PROCESSES_SPEAK = 5

app = typer.Typer(
    name="mambatrain",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich would take [brackets] in a help text for markup, and doubles the time of --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)
app.command(cls=PlainCommand, short_help="Turn text into token shards.")(tokenize)
app.command(cls=PlainCommand, short_help="Train a model from a recipe.")(pretrain)
app.command(cls=PlainCommand, short_help="Continue training from weights.")(finetune)
app.command(cls=PlainCommand, short_help="Measure a run or weights.")(evaluate)
app.command(cls=PlainCommand, short_help="Continue a prompt.")(generate)
app.command(cls=PlainCommand, short_help="Talk with a model.")(chat)
app.command(cls=PlainCommand, short_help="Write weights that other tools open.")(export)
app.command(cls=PlainCommand, short_help="Say what a recipe costs, before it starts.")(plan)
app.command(cls=PlainCommand, short_help="Say what works on this machine.")(doctor)
app.command(cls=PlainCommand, short_help="Print a SLURM script for a recipe.")(slurm)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(state_app, name="state")
app.add_typer(recipes_app, name="recipes")
app.add_typer(runs_app, name="runs")
app.add_typer(kernels_app, name="kernels")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"mambatrain {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train Mamba language models from raw text to open weights.

    `mambatrain COMMAND --help` explains each command.
    """


def _stdout_fails() -> bool:
    """Whether it is stdout that cannot be written: errors do not say, so it is given one more byte."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except OSError:
        return True
    return False


def _leave_stdout() -> None:
    """Else the interpreter flushes once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """The `mambatrain` command: a mistake of the user's gets a sentence and a hint, a bug keeps its traceback."""
    # Before torch is loaded. Waiting threads sleep instead of spinning: alone on a machine spinning gains a fifth on
    # small models, beside anything else it costs several times that (docs/benchmarks.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a reader that has gone away (`| head`) can still be caught
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            # Where the first process stumbles over the same thing, torchrun ends this one before it says it again.
            time.sleep(SECONDS_BEFORE_OTHER_PROCESSES_SPEAK)
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"\nhint: {error.hint}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        _leave_stdout()
        sys.exit(1)
    except OSError as error:
        if error.errno not in FULL_DISK or not _stdout_fails():
            raise
        _leave_stdout()
        print(f"error: stdout cannot be written: {os.strerror(error.errno).lower()}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:
            print("stopped", file=sys.stderr)
        raise
