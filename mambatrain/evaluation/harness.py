"""lm-evaluation-harness in process: find tasks, run them on our own model, hand back the scores."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambatrain.errors import UserError, nearest

if TYPE_CHECKING:
    from mambatrain.evaluation.harness_model import HarnessModel

BOOTSTRAPS = 1000  # resamples for a standard error without a formula (perplexity); lm-eval's 100,000 takes minutes
FEWSHOT_SEED = 1234  # lm-eval's own default: the same examples in front of the same question
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class TaskScore:
    """One number of one task."""

    task: str
    metric: str
    filter: str
    """How answers were extracted from generated text; "none" elsewhere."""
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_fewshot: int
    num_documents: int | None


def load_tasks(
    names: Sequence[str], *, include_path: Path | None = None, task_data: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """Finds tasks and reads their data, before a model is loaded.

    Args:
        names: what lm-eval knows (tasks, groups, tags, patterns such as `arc_*`), or paths of YAML task files.
        include_path: a folder of further YAML task files.
        task_data: the packaged task of that name reads its documents from this local file.

    Returns:
        lm-eval's TaskDict.

    Raises:
        UserError: lm_eval is missing, a name is unknown, or a task's data cannot be read.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(
            f"--include-path {include_path} is not a folder", "name the folder that the YAML task files lie in"
        )
    for name, file in (task_data or {}).items():
        _check_data_file(name, file)
    with _quietly():
        manager = _task_manager(names, include_path)
        specs = _specifications(names, task_data or {}, manager)
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name, spec in specs.items():
            try:
                for part, found in manager.load([spec]).items():
                    loaded[part].update(found)
            except Exception as error:  # whatever a task's YAML, its code or its data set may raise
                raise UserError(
                    f"task {name} cannot be loaded: {type(error).__name__}: {error}", _loading_hint(name, spec)
                ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name} runs code that the model wrote, or needs more than text", "leave it out")
    return loaded


def score_tasks(
    model: HarnessModel, tasks: dict[str, Any], *, limit: int | None = None, num_fewshot: int | None = None
) -> list[TaskScore]:
    """Runs loaded tasks.

    Args:
        model: ours, wrapped.
        tasks: what `load_tasks` returned.
        limit: documents of each task at most; for trials, not for scores.
        num_fewshot: solved examples before each question, where the task does not fix their number.
    """
    with _quietly():
        from lm_eval.evaluator import evaluate

        for task in tasks["tasks"].values():
            fixed = task.get_config("num_fewshot")
            if fixed is None or (num_fewshot is not None and fixed != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        results = evaluate(lm=model, task_dict=tasks, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    return list(_scores(results))


def _scores(results: dict[str, Any]) -> Iterator[TaskScore]:
    for name, entries in results["results"].items():
        for key, value in entries.items():
            metric, comma, extracted_by = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = entries.get(f"{metric}_stderr,{extracted_by}")
            yield TaskScore(
                task=name,
                metric=metric,
                filter=extracted_by,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=results["higher_is_better"].get(name, {}).get(metric),
                num_fewshot=results["n-shot"].get(name, 0),
                num_documents=results["n-samples"].get(name, {}).get("effective"),
            )


def _task_manager(names: Sequence[str], include_path: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError(
            "lm-evaluation-harness is not installed; --tasks needs it", "pip install 'mambatrain[eval]'"
        ) from None
    # The packaged tasks are 14,000 files, 10 seconds to read: not for a task that is a file here.
    only_files = all(_is_task_file(name) for name in names)
    return TaskManager(
        include_path=None if include_path is None else str(include_path), include_defaults=not only_files
    )


def _specifications(names: Sequence[str], task_data: Mapping[str, Path], manager: Any) -> dict[str, Any]:
    """Each task's name -> what lm-eval's TaskManager takes: a name, a file, or a whole configuration."""
    specs: dict[str, Any] = {}
    for name in names:
        if _is_task_file(name):
            specs[name] = name
            continue
        matches = manager.match_tasks([name])
        if not matches:
            close = nearest(name, manager.all_tasks)
            hint = f"did you mean `{close}`?" if close else "give a task of lm-eval, or the path of a .yaml task file"
            raise UserError(f"lm-eval has no task named {name}", hint)
        specs.update({match: match for match in matches})
    for name, file in task_data.items():
        if name not in specs:
            close = nearest(name, list(specs))
            raise UserError(
                f"--task-data {name}={file}: {name} is not among --tasks", f"did you mean `{close}`?" if close else None
            )
        specs[name] = _with_local_data(name, file, manager)
    return specs


def _is_task_file(name: str) -> bool:
    return Path(name).suffix in {".yaml", ".yml"} and Path(name).is_file()


def _with_local_data(name: str, file: Path, manager: Any) -> dict[str, Any]:
    """The packaged task's own definition (prompt, choices, metrics) over the documents of a local file."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index.get(name)
    config = {} if entry is None or entry.yaml_path is None else load_yaml(entry.yaml_path, resolve_func=True)
    if "task" not in config or isinstance(config["task"], list) or "class" in config:
        raise UserError(
            f"--task-data {name}={file}: {name} is not a single task", "name each of its tasks and its file"
        )
    if isinstance(config.get("fewshot_config"), dict):
        config["fewshot_config"] = {**config["fewshot_config"], "split": "test"}
    # One split alone: the file's. Few-shot examples come from it too, and because both name the same split, lm-eval
    # leaves a question out of its own examples.
    return config | {
        "dataset_path": _reader(file),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "custom_dataset": None,
        "test_split": "test",
        "validation_split": None,
        "training_split": None,
        "fewshot_split": "test",
    }


def _check_data_file(name: str, file: Path) -> None:
    if not file.is_file():
        raise UserError(f"--task-data {name}={file}: there is no such file", "name the .jsonl, .parquet or .csv file")
    if _reader(file) is None:
        raise UserError(
            f"--task-data {name}={file}: the format is not known", f"it ends in one of {', '.join(READERS)}"
        )


def _reader(file: Path) -> str | None:
    """The builder of `datasets` that reads a file, by its ending."""
    return READERS.get(Path(file.name.removesuffix(".gz")).suffix)


def _loading_hint(name: str, spec: Any) -> str:
    if isinstance(spec, dict):
        return "check that the file has the columns which the task reads"
    if _is_task_file(name):
        return "check its dataset_path and data_files; paths in it are relative to the current folder"
    return f"without a network, give the documents as a file: --task-data {name}=FILE.jsonl"


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps lm-eval's notes off the screen, its prints off stdout, and its process pool (a fork of torch) away."""
    logger = logging.getLogger("lm_eval")
    level, pool = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        if pool is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = pool
