"""`evaluate`: held-out loss, and the tasks of lm-evaluation-harness, on one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambatrain.cli.open_model import BaseOption, EndOption, TokenizerOption, WeightsArgument
from mambatrain.cli.train import Device, DeviceOption, Kernels, KernelsOption
from mambatrain.errors import UserError

if TYPE_CHECKING:
    from mambatrain.cli.open_model import OpenModel
    from mambatrain.data.tokenizer import LoadedTokenizer
    from mambatrain.evaluation.held_out_text import HeldOutText
    from mambatrain.models.state import BlockState

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Folder of tokens whose held-out part is predicted. [default: the run's own, without --tasks]",
    ),
]
TasksOption = Annotated[
    str | None,
    typer.Option("--tasks", metavar="NAME,...", help="Tasks of lm-evaluation-harness, or paths of YAML task files."),
]
TaskDataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task-data",
        metavar="NAME=FILE",
        help="The task reads its documents from this .jsonl, .parquet or .csv file: no network is needed; repeatable.",
    ),
]
IncludeOption = Annotated[
    Path | None, typer.Option("--include-path", metavar="DIR", help="Folder of further YAML task files.")
]
FewshotOption = Annotated[
    int | None,
    typer.Option("--num-fewshot", min=0, metavar="N", help="Solved examples before each question of a task."),
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", min=1, metavar="N", help="Documents of each task at most: a trial, not a score."),
]
MaxLengthOption = Annotated[
    int,
    typer.Option(
        "--max-length", min=2, metavar="N", help="Tokens of a task's text read at most; what is longer loses its start."
    ),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        min=1,
        metavar="N",
        help="Whole held-out documents up to this many. [default: the run's, or 500,000]",
    ),
]
RowTokensOption = Annotated[
    int | None,
    typer.Option(
        "--row-tokens", min=1, metavar="N", help="Tokens in a row of held-out text. [default: the run's, or 2048]"
    ),
]
BatchRowsOption = Annotated[
    int, typer.Option("--batch-rows", min=1, metavar="N", help="Rows at once: speed against memory.")
]
JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the numbers as JSON; - writes them to stdout alone.")
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Write evaluation.json, and the loss by position as loss_by_position.png."
    ),
]


def evaluate(
    weights: WeightsArgument,
    data: DataOption = None,
    tasks: TasksOption = None,
    task_data: TaskDataOption = None,
    include_path: IncludeOption = None,
    num_fewshot: FewshotOption = None,
    limit: LimitOption = None,
    max_length: MaxLengthOption = 2048,
    max_tokens: MaxTokensOption = None,
    row_tokens: RowTokensOption = None,
    batch_rows: BatchRowsOption = 8,
    json_file: JsonOption = None,
    out: OutOption = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", metavar="FILE", help="A trained state that each document begins with, in a row of its own."
        ),
    ] = None,
    kernels: KernelsOption = Kernels.auto,
    device: DeviceOption = Device.auto,
    base: BaseOption = None,
    tokenizer: TokenizerOption = None,
    end_of_document: EndOption = None,
) -> None:
    """Measure a model in fp32: its loss on held-out text in bits per byte, and its score in standard tasks.

    \b
    Examples:
      mambatrain evaluate demo/run
      mambatrain evaluate exported --data tokens --out report
      mambatrain evaluate demo/run --tasks lambada_openai,arc_easy --json scores.json
      mambatrain evaluate demo/run --tasks arc_easy --task-data arc_easy=arc_easy_val.jsonl
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    _refuse_without_tasks(names, task_data, include_path, num_fewshot, limit)
    if state is not None and (names or out is not None):
        raise UserError("--state is about the held-out loss alone, not about --tasks or --out", "leave these out")
    from mambatrain.adapters.open_weights import refuse_no_weights
    from mambatrain.cli.open_model import open_model, open_tokenizer

    refuse_no_weights(weights)
    # What can be wrong is looked at first; the model, which takes its time, comes last.
    loaded_tasks = _load_tasks(names, include_path, task_data or []) if names else None
    text = None
    if data is not None or not names:
        from mambatrain.evaluation.held_out_text import find_held_out_text

        text = find_held_out_text(weights, data, row_tokens, max_tokens, state is not None)
    opened = open_model(weights, kernels.value, device.value, base)
    results: dict[str, Any] = {
        "weights": opened.weights.origin,
        "digest": opened.weights.digest,
        "kernels": opened.backend.name,
    }
    if text is not None:
        start = None if state is None else _open_trained_state(state, opened, open_tokenizer(opened, tokenizer, None))
        results["held_out"] = _measure(opened, text, batch_rows, tokenizer, out, start)
    if loaded_tasks is not None:
        spelling = open_tokenizer(opened, tokenizer, end_of_document)
        results["tasks"] = _score(opened, spelling, loaded_tasks, limit, num_fewshot, max_length, batch_rows)
    _show(results, json_file, out)


def _refuse_without_tasks(names: list[str], *options: Any) -> None:
    if not names and any(option is not None for option in options):
        raise UserError(
            "--task-data, --include-path, --num-fewshot and --limit are about --tasks, of which there are none",
            "for example --tasks lambada_openai",
        )


def _load_tasks(names: list[str], include_path: Path | None, task_data: list[str]) -> dict[str, Any]:
    from mambatrain.evaluation.harness import load_tasks

    files = {}
    for pair in task_data:
        name, equals, file = pair.partition("=")
        if not (name and equals and file):
            raise UserError(f"--task-data {pair} is not of the form NAME=FILE", "--task-data arc_easy=arc_easy.jsonl")
        files[name] = Path(file)
    typer.echo("reading lm-eval's tasks ...", err=True)
    return load_tasks(names, include_path=include_path, task_data=files)


def _measure(
    opened: OpenModel,
    text: HeldOutText,
    batch_rows: int,
    tokenizer: Path | None,
    out: Path | None,
    start: list[BlockState] | None,
) -> dict[str, Any]:
    """The held-out loss; by position as well where there is a folder for it."""
    from mambatrain.cli.open_model import refuse_other_tokenizer
    from mambatrain.evaluation.held_out import measure_held_out
    from mambatrain.evaluation.loss_by_position import (
        draw_loss_by_position,
        log_spaced_bins,
        measure_loss_by_position,
    )

    refuse_other_tokenizer(opened.weights, tokenizer, text.tokens)
    shard = text.batches.windows.shard
    if shard.vocab_size is None:  # of a bare pair; its ids are checked as they are read
        shard.vocab_size = opened.weights.section.padded_vocab_size
    micro_batches = _with_progress(text, batch_rows)
    results: dict[str, Any] = {}
    if out is None:
        loss = measure_held_out(opened.model, micro_batches, text.batches.num_bytes, start)
    else:
        positions = measure_loss_by_position(opened.model, micro_batches)
        loss = positions.held_out(text.batches.num_bytes)
        bins = log_spaced_bins(positions)
        draw_loss_by_position(bins, f"held-out text of {text.tokens.where}", out / "loss_by_position.png")
        results["by_position"] = [one._asdict() for one in bins]
    return {
        "data": str(text.tokens.where),
        "num_documents": text.batches.num_documents,
        "num_tokens": loss.num_targets,
        "num_bytes": loss.num_bytes,
        "row_tokens": text.row_tokens,
        "nats_per_token": loss.nats_per_token,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
    } | results


def _open_trained_state(file: Path, opened: OpenModel, loaded: LoadedTokenizer) -> list[BlockState]:
    """The layers of a trained state.

    Raises:
        UserError: it is not that of these weights, or stands behind a text.
    """
    from mambatrain.cli.state import open_state

    found = open_state(file, opened, loaded)
    assert found is not None
    if found.state.num_tokens:
        raise UserError(
            f"{file} stands behind a text of {found.state.num_tokens:,} tokens and was not trained to begin one",
            "name a state that `mambatrain finetune` trained",
        )
    return found.state.layers


def _with_progress(text: HeldOutText, batch_rows: int) -> Any:
    import sys

    from rich.console import Console
    from rich.progress import track

    return track(
        text.batches.micro_batches(batch_rows),
        description="predicting",
        total=-(-text.batches.windows.num_windows // batch_rows),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _score(
    opened: OpenModel,
    tokenizer: LoadedTokenizer,
    tasks: dict[str, Any],
    limit: int | None,
    num_fewshot: int | None,
    max_length: int,
    batch_rows: int,
) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from mambatrain.evaluation.harness import score_tasks
    from mambatrain.evaluation.harness_model import HarnessModel

    model = HarnessModel(
        opened.model,
        tokenizer.tokenizer,
        tokenizer.end_of_document_id,
        tokenizer.vocab_size,
        max_length=max_length,
        batch_rows=batch_rows,
    )
    return [asdict(score) for score in score_tasks(model, tasks, limit=limit, num_fewshot=num_fewshot)]


def _show(results: dict[str, Any], json_file: str | None, out: Path | None) -> None:
    """A table for people on stdout, unless stdout is for the JSON; the same numbers in files."""
    import json

    from mambatrain.cli.score_table import result_lines

    as_json = json.dumps(results, indent=2, ensure_ascii=False)
    for line in result_lines(results):
        typer.echo(line, err=json_file == "-")
    if json_file == "-":
        print(as_json)
    elif json_file is not None:
        _write(Path(json_file), as_json)
    if out is not None:
        _write(out / "evaluation.json", as_json)


def _write(file: Path, text: str) -> None:
    from mambatrain.files import write_errors_named, write_text_whole

    with write_errors_named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_whole(file, text + "\n")
    typer.echo(f"wrote {file}", err=True)
