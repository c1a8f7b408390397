"""Starting, resuming and ending a run in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mambatrain.devices import from_main_process
from mambatrain.errors import UserError
from mambatrain.files import explaining_full_disk, write_text_whole
from mambatrain.launch import EXIT_STOPPED, rank_of_process
from mambatrain.recipe import Recipe, differing_settings, read_recipe, write_recipe
from mambatrain.report.loss_picture import draw_loss
from mambatrain.report.preference_picture import draw_preferences
from mambatrain.runs.branch import begin_branch, refuse_branch, refuse_other_branch, run_of
from mambatrain.runs.checkpoint import (
    checkpoint_to_resume,
    list_checkpoints,
    prune_checkpoints,
    put_back_replaced,
    read_progress,
    set_newer_aside,
)
from mambatrain.runs.folder import RunFolder, cut_log, read_log
from mambatrain.runs.weights import Weights
from mambatrain.training.assemble import Where, assemble, choose_parts, start_processes
from mambatrain.training.loop import train
from mambatrain.training.lost_ranks import explaining_lost_ranks, is_lost_connection
from mambatrain.training.metrics import print_fact
from mambatrain.training.rank_watch import RankWatch, watching_ranks
from mambatrain.training.resolve import Resolved, read_facts, refuse_changed_origin
from mambatrain.training.results import refuse_moved_base, write_adapter
from mambatrain.training.show_chats import show_chats
from mambatrain.training.stop import StopRequest
from mambatrain.training.vocabulary import fit_vocabulary

if TYPE_CHECKING:
    from accelerate import Accelerator

Resume = Literal["if-possible", "required", "fresh"]


def run_training(
    recipe: Recipe,
    path: Path,
    where: Where,
    resume: Resume,
    stop: StopRequest,
    weights: Weights | None = None,
    branch_from: Path | None = None,
) -> int:
    """Trains a recipe in a run folder, from where the folder's newest whole checkpoint left off.

    Args:
        recipe: what is trained.
        path: the run folder; made where it does not exist.
        where: device, kernels, tracker.
        resume: `if-possible` continues a run of the same recipe, `required` refuses to begin, `fresh` moves what
            is there aside and begins.
        stop: entered by the caller, so that a signal while things are set up is a request, too.
        weights: what a new run starts from; None is the initialisation.
        branch_from: the checkpoint of another run that a new run goes on from, with its recipe changed.

    Returns:
        0 when the last step is done, 75 when the run was asked to stop before.

    Raises:
        UserError: the folder holds another recipe's run or is in use, or something does not fit.
    """
    recipe, weights = fit_vocabulary(recipe, weights)
    folder = RunFolder(path)
    is_main = rank_of_process() == 0
    with explaining_lost_ranks(stop), folder.locked() if is_main else nullcontext(), ExitStack() as entered:
        if is_main and resume == "fresh":
            _move_aside(folder)
        damaged: list[str] = []
        checkpoint, branching = _find_start(recipe, folder, resume, branch_from, damaged)
        origin = folder if branching is None else run_of(branching)
        begins = checkpoint is None and branching is None
        accelerator, resolved, watch = entered.enter_context(_joined_processes(recipe, folder, origin, where, begins))
        # A shared file system may show another machine an older state of the folder.
        checkpoint, branching = from_main_process((checkpoint, branching))
        if weights is None:
            refuse_without_weights(recipe)
        # All that can be refused is, before a file of the run is written: a typo must not leave a run behind.
        parts = choose_parts(recipe, folder, origin, where, accelerator, resolved, weights)
        if is_main:
            if not begins:
                # A branch begins with a checkpoint; what the first run began with is in that run's own facts.
                facts = read_facts(origin) | ({} if branching is None else {"started_from": None})
                refuse_changed_origin(folder, facts, parts.data.digest, weights)
            if branching is None:
                _prepare_folder(recipe, folder, checkpoint, damaged, parts.data.tokenizer_file)
            else:
                begin_branch(branching, recipe, folder)
            show_chats(parts.data)
        accelerator.wait_for_everyone()
        if branching is not None:
            checkpoint = folder.checkpoints / branching.name
        run = assemble(recipe, folder, where, parts, checkpoint, watch)
        stopped = False
        try:
            if run.progress.step >= recipe.total_steps and not run.progress.held_out_pending:
                run.reporter.say(f"{path} is finished: {run.progress.step:,} steps are done")
            else:
                stopped = train(run, stop)
                watch.be_patient("ending", run.progress.draw)
                refuse_moved_base(run)
        except Exception as error:  # who leaves at once (KeyboardInterrupt) does not wait
            if not (parts.shards > 1 and is_lost_connection(error)):  # the lost rank's part would never come
                run.background.wait()
            if run.background.has_failed:
                print_fact("warning", "the checkpoint that was being written meanwhile was not finished")
            raise
        finally:
            run.reporter.close()
        if is_main:
            if recipe.adapter is not None and weights is not None:
                write_adapter(run, weights)
            _conclude(recipe, folder, stopped, " without --fresh" if resume == "fresh" else "")
        accelerator.wait_for_everyone()
    return EXIT_STOPPED if stopped else 0


def refuse_without_weights(recipe: Recipe) -> None:
    """
    Raises:
        UserError: the recipe trains something that needs weights.
    """
    needs = {
        "trains an adapter, which needs weights to stand on": recipe.adapter is not None,
        "learns from preferences, which needs weights for its reference": recipe.preferences is not None,
    }
    for what, is_so in needs.items():
        if is_so:
            raise UserError(f"the recipe {what}", "mambatrain finetune RECIPE --from WEIGHTS")


@contextmanager
def _joined_processes(
    recipe: Recipe, folder: RunFolder, origin: RunFolder, where: Where, begins: bool
) -> Iterator[tuple[Accelerator, Resolved, RankWatch]]:
    """All processes of the run together; each holds the folder, and watches the others."""
    accelerator, resolved = start_processes(recipe, origin, where, fresh=begins)
    accelerator.wait_for_everyone()  # rank 0 has locked: one that comes before it would look like a leftover
    with (
        watching_ranks(accelerator.process_index, accelerator.num_processes, where.rank_timeout) as watch,
        nullcontext() if accelerator.is_main_process else folder.shared(),
    ):
        yield accelerator, resolved, watch


def _find_start(
    recipe: Recipe, folder: RunFolder, resume: Resume, branch_from: Path | None, damaged: list[str]
) -> tuple[Path | None, Path | None]:
    """The folder's own checkpoint to resume from, else that of another run to branch from; neither: the beginning."""
    is_main = rank_of_process() == 0
    if is_main:
        refuse_foreign_folder(folder)
        put_back_replaced(folder.path)
        refuse_other_recipe(recipe, folder)
    checkpoint = None if resume == "fresh" else checkpoint_to_resume(folder.path, damaged)
    if checkpoint is None and resume == "required":
        raise UserError(
            f"{folder.path} holds no whole checkpoint to resume from", "leave --resume out to begin a new run"
        )
    if is_main and branch_from is not None:
        refuse_other_branch(branch_from, folder)
    if checkpoint is not None or branch_from is None:
        return checkpoint, None
    if is_main:
        refuse_branch(branch_from, recipe)
    return None, branch_from


def refuse_foreign_folder(folder: RunFolder) -> None:
    """
    Raises:
        UserError: there are files in the folder and no run that they could belong to.
    """
    # A life that was killed while it wrote the recipe has left a partial file; one that was refused, its conversations.
    chats = folder.chats.name
    ours = (".lock", f".{folder.recipe_file.name}.partial", "before-", chats, f".{chats}.")
    files = [path for path in folder.path.iterdir() if not path.name.startswith(ours)]
    if files and not folder.exists():
        raise UserError(f"{folder.path} is not empty and holds no run", "give a new --run folder")


def refuse_other_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """
    Raises:
        UserError: the folder holds a run of another recipe; the keys that differ are named.
    """
    begun = list_checkpoints(folder.path) or read_log(folder.log_file)
    if not folder.exists() or not begun:
        return
    differing = differing_settings(read_recipe(str(folder.recipe_file)), recipe)
    if differing:
        raise UserError(
            f"{folder.path} holds a run of another recipe:\n" + "\n".join(f"  {line}" for line in differing),
            "give another --run folder, or --fresh to move this run aside and begin again",
        )


def _prepare_folder(
    recipe: Recipe, folder: RunFolder, checkpoint: Path | None, damaged: list[str], tokenizer: Path | None
) -> None:
    """Brings the folder to the moment of the checkpoint, or to the beginning."""
    for damage in damaged:
        print_fact("warning", f"{damage}; an older checkpoint is used")
    with explaining_full_disk(f"run folder {folder.path}"):
        folder.stopped_marker.unlink(missing_ok=True)
        if checkpoint is not None:
            set_newer_aside(folder.path, checkpoint)
            # A life that was killed right behind a save has not removed what that save made superfluous.
            prune_checkpoints(folder.path, recipe.checkpoint, read_progress(checkpoint).best_step)
        write_text_whole(folder.recipe_file, write_recipe(recipe))  # first: it says that the other files are a run's
        cut_log(folder.log_file, 0 if checkpoint is None else read_progress(checkpoint).log_lines)
        if tokenizer is not None and checkpoint is None:
            write_text_whole(folder.tokenizer_file, tokenizer.read_text(encoding="utf-8"))
            for file in folder.chat_files:
                if (beside := tokenizer.with_name(file.name)).is_file():
                    write_text_whole(file, beside.read_text(encoding="utf-8"))


def _conclude(recipe: Recipe, folder: RunFolder, stopped: bool, how: str) -> None:
    """The marker first: a batch script waits for it. Then the picture and the last words."""
    if stopped:
        write_text_whole(folder.stopped_marker, f"asked to stop; the same command{how} continues\n")
    try:
        draw = draw_loss if recipe.preferences is None else draw_preferences
        if draw(read_log(folder.log_file), folder.loss_picture, f"{folder.path.name}: {recipe.model.block}"):
            print_fact("picture", str(folder.loss_picture))
    except (OSError, ImportError) as error:  # the weights are safe: a picture is no reason to fail
        print_fact("warning", f"{folder.loss_picture} was not drawn: {error}")
    if checkpoints := list_checkpoints(folder.path):
        print_fact("checkpoint", str(checkpoints[-1]))
    if stopped:
        print_fact("stopped", f"the same command{how} continues from here")


def _move_aside(folder: RunFolder) -> None:
    """Moves an earlier run into RUN/before-N; nothing is deleted and nothing else is touched.

    The checkpoints go first and the recipe last: cut short, what remains is never taken for a run to resume.
    """
    number = 1
    while (folder.path / f"before-{number}").exists():
        number += 1
    aside = folder.path / f"before-{number}"
    parts = (
        folder.checkpoints,
        folder.log_file,
        folder.facts_file,
        folder.loss_picture,
        folder.stopped_marker,
        folder.tokenizer_file,
        *folder.chat_files,
        folder.branch_file,
        folder.adapter,
        folder.tuned_state,
        folder.path / "wandb",
        folder.recipe_file,
    )
    if not (folder.exists() or folder.checkpoints.exists()):
        return
    aside.mkdir()
    for part in parts:
        if part.exists():
            part.replace(aside / part.name)
    print_fact("moved", f"the earlier run to {aside}")
