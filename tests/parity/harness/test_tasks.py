"""Scores of whole tasks on our model, against lm-eval's `hf` model on the exported folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'mambatrain[eval]'")

from lm_eval import simple_evaluate
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mambatrain.evaluation.harness import BOOTSTRAPS, TaskScore, load_tasks, score_tasks
from mambatrain.evaluation.harness_model import HarnessModel

EVAL_DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "eval"


def metrics(**aggregations: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": how, "higher_is_better": True} for name, how in aggregations.items()]


TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "num_fewshot": 1,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": metrics(acc="mean", acc_norm="mean"),
    },
    "last_word": {
        "output_type": "loglikelihood",
        "num_fewshot": 0,
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
        "metric_list": metrics(acc="mean", perplexity="perplexity"),
    },
    "whole_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": metrics(word_perplexity="weighted_perplexity", bits_per_byte="bits_per_byte"),
    },
    "copy": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": metrics(exact_match="mean"),
    },
}


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"text": text, "question": text[:20], "choices": ["blue", " the mat", "日本"], "answer": index % 3}
        for index, text in enumerate([*sentences, " ".join(sentences)])
    ]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **task}), encoding="utf-8")
    return [str(folder / f"{name}.yaml") for name in TASKS]


def assert_same_results(ours: list[TaskScore], theirs: dict[str, Any]) -> None:
    found = {(score.task, f"{score.metric},{score.filter}"): score for score in ours}
    expected = {
        (task, key): (value, entries[key.replace(",", "_stderr,")])
        for task, entries in theirs["results"].items()
        for key, value in entries.items()
        if "," in key and "_stderr" not in key
    }
    assert found.keys() == expected.keys()
    for key, (value, stderr) in expected.items():
        assert found[key].value == pytest.approx(value, rel=1e-5), key
        assert found[key].stderr == (pytest.approx(stderr, rel=1e-4) if stderr != "N/A" else None), key
        assert found[key].num_documents == theirs["n-samples"][key[0]]["effective"]


@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_local_tasks(
    pair: tuple[HarnessModel, HFLM], task_files: list[str], num_fewshot: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    scores = score_tasks(ours, load_tasks(task_files), num_fewshot=num_fewshot)
    results = simple_evaluate(
        theirs,
        tasks=task_files,
        num_fewshot=num_fewshot,
        bootstrap_iters=BOOTSTRAPS,
        log_samples=False,
        task_manager=TaskManager(include_defaults=False),
    )
    assert_same_results(scores, results)
    assert {score.task for score in scores} == set(TASKS)
    assert {score.task: score.num_fewshot for score in scores} == results["n-shot"]


@pytest.mark.parametrize("pair", ["mamba1"], indirect=True)  # once: reading lm-eval's 14,000 task files takes 10 s
def test_standard_tasks_on_local_documents(pair: tuple[HarnessModel, HFLM]) -> None:
    files = {
        "lambada_openai": "lambada_openai_test.jsonl",
        "arc_easy": "arc_easy_val.jsonl",
        "mmlu_anatomy": "mmlu_validation.jsonl.gz",
    }
    paths = {name: EVAL_DATA / file for name, file in files.items()}
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        pytest.skip(f"the shared data are not here: {', '.join(missing)}")
    ours, theirs = pair
    tasks = load_tasks(list(files), task_data=paths)
    scores = score_tasks(ours, tasks, limit=6)
    results = evaluate(theirs, tasks, limit=6, bootstrap_iters=0, log_samples=False)
    assert {score.task for score in scores} == set(files)
    for score in scores:
        assert score.value == pytest.approx(results["results"][score.task][f"{score.metric},none"], rel=1e-5)
        assert score.num_documents == 6
