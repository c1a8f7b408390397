"""What `data show` shows: the data of a recipe or a run, opened without leaving anything behind, and printed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambatrain.data.open_tokens import Tokens
    from mambatrain.data.tokenizer import LoadedTokenizer
    from mambatrain.data.training_data import TrainingData
    from mambatrain.data.training_order import TrainingOrder


@contextmanager
def open_shown_data(
    name: str, overrides: list[str] | None, weights: str | None, tokenizer: Path | None
) -> Iterator[TrainingData]:
    """The data of a recipe or a run; conversations that no run keeps are tokenized for this once.

    Args:
        name: a recipe or a run.
        overrides: of --set.
        weights: as `finetune` gets them; None: the recipe says what the model is.
        tokenizer: of conversations, where nothing else names one.
    """
    from tempfile import TemporaryDirectory

    from mambatrain.chats.open_chats import open_chats
    from mambatrain.data.training_data import open_training_data
    from mambatrain.recipe import read_recipe
    from mambatrain.runs.folder import RunFolder
    from mambatrain.runs.weights import read_weights
    from mambatrain.training.vocabulary import fit_vocabulary

    run = RunFolder(Path(name))
    start = None if weights is None else read_weights(weights)
    file = str(run.recipe_file) if run.exists() else name
    read = read_recipe(file, overrides, model=None if start is None else start.section)
    if not run.exists():
        read, start = fit_vocabulary(read, start)
    if read.data.chats is None or (run.exists() and not overrides):
        yield open_training_data(read, may_write=False, chats=run.chats)
        return
    own = (run.tokenizer_file if run.exists() else tokenizer) if start is None else start.tokenizer_file
    with TemporaryDirectory() as folder:
        open_chats(read, own, Path(folder) / "chats")
        yield open_training_data(read, may_write=False, chats=Path(folder) / "chats")


def print_chats(chats: Sequence[Tokens], count: int, to_stderr: bool) -> dict[str, Any]:
    """Prints some conversations of each folder; gives them as numbers."""
    from rich.console import Console

    from mambatrain.chats.open_chats import chat_lines
    from mambatrain.data.tokenizer import load_tokenizer
    from mambatrain.report.chat_text import LEGEND, chat_tokens, shown_chats

    console = Console(stderr=to_stderr, highlight=False)
    shown = []
    for tokens in chats:
        corpus, shard = tokens.corpus, tokens.train
        assert corpus is not None and shard.counted is not None, "conversations lie in folders of ours"
        for line in chat_lines(corpus):
            console.print(line, soft_wrap=True, markup=False)
        loaded = load_tokenizer(corpus.tokenizer_file, corpus.manifest.tokenizer.end_of_document)
        for number, (title, text) in enumerate(shown_chats(tokens, loaded, count)):
            console.print(f"\n{title}; {LEGEND}", style="bold", soft_wrap=True, markup=False)
            console.print(text, soft_wrap=True)
            each = 2 if tokens.holds_pairs else 1  # of a pair, chosen and rejected
            for conversation in range(number * each, (number + 1) * each):
                ids, counted = chat_tokens(shard, conversation)
                shown.append({"conversation": conversation, "tokens": ids, "counted": counted})
    return {"conversations": shown}


def print_rows(
    order: TrainingOrder, draw: int, num_rows: int, loaded: LoadedTokenizer | None, to_stderr: bool
) -> dict[str, Any]:
    """Prints some rows of a draw; gives them as numbers."""
    from rich.console import Console

    from mambatrain.cli.token_tables import row_text, row_title
    from mambatrain.data.drawn_rows import rows_of_draw

    shown = rows_of_draw(order, draw, num_rows)
    console = Console(stderr=to_stderr, highlight=False)
    for row in shown:
        console.print(row_title(row), style="bold", soft_wrap=True, markup=False)
        console.print(row_text(row, loaded), soft_wrap=True)
        console.print()
    drawn = order.rows_by_source(draw)
    counted = ", ".join(f"{count} of {name}" for name, count in drawn.items())
    console.print(f"draw {draw:,}: {sum(drawn.values())} rows, {counted}", soft_wrap=True, markup=False)
    return {"draw": draw, "rows_by_source": drawn, "rows": [row.as_json() for row in shown]}
