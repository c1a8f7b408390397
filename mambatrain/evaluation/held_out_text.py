"""Which held-out text a model is measured on: a folder's, or the one a run was trained beside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mambatrain.data.held_out_batches import HeldOutBatches
from mambatrain.data.open_tokens import Tokens, open_tokens
from mambatrain.data.training_data import refuse_longer_chats
from mambatrain.errors import UserError
from mambatrain.recipe import Recipe, read_recipe
from mambatrain.runs.folder import RunFolder

ROW_TOKENS = 2048  # where no run says
MAX_TOKENS = 500_000


@dataclass(frozen=True)
class HeldOutText:
    """Documents to predict, and in rows of which length."""

    tokens: Tokens
    row_tokens: int
    batches: HeldOutBatches


def find_held_out_text(
    where: str,
    data: Path | None,
    row_tokens: int | None = None,
    max_tokens: int | None = None,
    document_rows: bool = False,
) -> HeldOutText:
    """What the user named, else what the run's recipe says, so that the figure is that of the run's log.

    Args:
        where: the run or weights to be measured.
        data: a folder of tokens, or a bare pair, which is measured whole; None: the run's own.
        row_tokens: L; None: the run's, else ROW_TOKENS.
        max_tokens: whole documents up to this many; None: the run's, else MAX_TOKENS.
        document_rows: a row for each document, cut where it is longer, as for a trained state.

    Raises:
        UserError: there is no such folder, or nothing in it is held out.
    """
    recipe = recipe_of_run(where)
    if data is None:
        if recipe is None:
            raise UserError(f"{where} is no run, so there is no text that belongs to it", "name some: --data SHARDS")
        named, data = recipe.data.held_out, Path(recipe.data.held_out or recipe.data.all_shards[0])
        if recipe.data.chats is not None and named is None:
            data = run_of(where).chats
    else:
        named = str(data)
    tokens = open_tokens(data)
    if tokens.holds_pairs:
        raise UserError(
            f"{data} holds preference pairs: half of its answers are those that were rejected",
            "a run's log has the reward margin of its held-out pairs; --data SHARDS measures the loss on text",
        )
    length = row_tokens or (ROW_TOKENS if recipe is None else recipe.data.longest_row_tokens)
    most = max_tokens or (MAX_TOKENS if recipe is None else recipe.evaluation.max_tokens)
    shard, known = tokens.held_out, tokens.held_out_bytes
    if shard is None and named is not None:  # a bare pair that was named for this: all of it
        shard, known = tokens.train, tokens.train_bytes
    if shard is not None and shard.counted is not None:
        refuse_longer_chats(tokens, length)
    batches = None if shard is None else HeldOutBatches(shard, known, length, most, document_rows)
    if batches is None or not batches.num_documents:
        raise UserError(f"{data} holds no held-out documents", "tokenize with --held-out FRACTION above 0")
    return HeldOutText(tokens, length, batches)


def recipe_of_run(where: str) -> Recipe | None:
    """The recipe of a run, or of the run that a checkpoint lies in; None for other weights."""
    run = run_of(where)
    return read_recipe(str(run.recipe_file)) if run.exists() else None


def run_of(where: str) -> RunFolder:
    """The run that is named, or the one that a checkpoint lies in; for other weights, one that does not exist."""
    path = Path(where).expanduser()
    return next((run for run in (RunFolder(path), RunFolder(path.parent.parent)) if run.exists()), RunFolder(path))
