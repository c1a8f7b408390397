"""Finding tasks and giving them local documents; scores are compared in parity/harness."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'mambatrain[eval]'")

from lm_eval.tasks import TaskManager

from mambatrain.errors import UserError
from mambatrain.evaluation.harness import _quietly, _scores, _specifications, load_tasks

TASK: dict[str, Any] = {
    "dataset_path": "somebody/on_the_hub",
    "dataset_name": "some_configuration",
    "training_split": "train",
    "validation_split": "validation",
    "fewshot_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module", autouse=True)
def own_dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks as lm-eval packages them: a shared template, a tag, a group; and local documents."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "_template").write_text(yaml.safe_dump(TASK))
    for name in ("colours", "animals"):
        task = {"include": "_template", "task": name, "tag": "quizzes", "description": f"About {name}.\n"}
        task |= {"fewshot_config": {"sampler": "first_n", "split": "train"}} if name == "colours" else {}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    (folder / "_quiz.yaml").write_text(yaml.safe_dump({"group": "quiz", "task": ["colours", "animals"]}))
    documents = [{"question": f"Question {n}?", "choices": ["yes", "no"], "answer": n % 2} for n in range(4)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "others.jsonl").write_text('{"something": "else"}\n')
    return folder


@pytest.fixture(scope="module")
def manager(folder: Path) -> TaskManager:
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["colours"], ["colours"]),
        (["a*", "colours"], ["animals", "colours"]),
        (["quizzes"], ["quizzes"]),
        (["quiz"], ["quiz"]),
        (["colours", "colours"], ["colours"]),
    ],
)
def test_names(manager: TaskManager, names: list[str], found: list[str]) -> None:
    assert list(_specifications(names, {}, manager)) == found


def test_an_unknown_name_gets_the_nearest(manager: TaskManager) -> None:
    with pytest.raises(UserError, match="no task named colors") as caught:
        _specifications(["colors"], {}, manager)
    assert caught.value.hint == "did you mean `colours`?"


@pytest.mark.parametrize("name", ["colours", "animals"])
def test_a_packaged_task_over_local_documents(folder: Path, manager: TaskManager, name: str) -> None:
    """Its definition is kept, template included; its documents, and nothing from the hub, are the file's."""
    spec = _specifications([name], {name: folder / "documents.jsonl"}, manager)[name]
    task = manager.load([spec])["tasks"][name]
    assert [task.doc_to_text(document) for document in task.eval_docs] == [f"Question {n}?" for n in range(4)]
    assert task.config.description == f"About {name}.\n"
    assert task.config.doc_to_choice == "{{choices}}"
    task.set_config(key="num_fewshot", value=2)
    task.set_fewshot_seed(seed=1)
    for document in task.eval_docs:
        context = task.fewshot_context(document, 2)
        assert context.startswith(f"About {name}.\n")
        assert context.endswith(document["question"])
        assert context.count(document["question"]) == 1  # never with its own answer
        assert context.count("Question") == 3


@pytest.mark.parametrize("name", ["quiz", "quizzes"])
def test_documents_belong_to_a_single_task(folder: Path, manager: TaskManager, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is not a single task"):
        _specifications([name], {name: folder / "documents.jsonl"}, manager)


def test_documents_of_a_task_that_does_not_run(folder: Path, manager: TaskManager) -> None:
    with pytest.raises(UserError, match="animal is not among --tasks") as caught:
        _specifications(["animals"], {"animal": folder / "documents.jsonl"}, manager)
    assert caught.value.hint == "did you mean `animals`?"


def test_documents_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    task = {**TASK, "task": "misfit", "dataset_path": "json", "dataset_name": None}
    task |= {"dataset_kwargs": {"data_files": {"validation": str(folder / "others.jsonl")}}}
    task |= {"training_split": None, "fewshot_split": None}
    file = tmp_path / "misfit.yaml"
    file.write_text(yaml.safe_dump(task))
    with pytest.raises(UserError, match=r"misfit\.yaml cannot be loaded: .*question"):
        load_tasks([str(file)])


def test_lm_eval_is_quiet_and_nothing_stays_changed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    logger = logging.getLogger("lm_eval")
    level = logger.level
    with pytest.raises(ValueError, match="in the middle"), _quietly():
        print("what lm-eval prints")
        assert not logging.getLogger("lm_eval.tasks").isEnabledFor(logging.WARNING)
        assert os.environ["DISABLE_MULTIPROC"] == "1"
        raise ValueError("in the middle")
    assert capsys.readouterr() == ("", "what lm-eval prints\n")
    assert logger.level == level
    assert "DISABLE_MULTIPROC" not in os.environ


def test_numbers_of_a_result() -> None:
    results = {
        "results": {
            "one": {"alias": "one", "sample_len": 5, "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.25},
            "all": {"alias": "all", "acc,none": 0.5, "acc_stderr,none": "N/A"},
            "empty": {"alias": " ", "acc,none": " "},
        },
        "higher_is_better": {"one": {"acc": True}},
        "n-shot": {"one": 3},
        "n-samples": {"one": {"original": 9, "effective": 5}},
    }
    first, second, third = _scores(results)
    assert (first.task, first.metric, first.filter, first.value, first.stderr) == ("one", "acc", "none", 0.5, 0.1)
    assert (first.higher_is_better, first.num_fewshot, first.num_documents) == (True, 3, 5)
    assert (second.metric, second.filter, second.stderr, second.higher_is_better) == ("f1", "strict", None, None)
    assert (third.task, third.stderr, third.num_documents) == ("all", None, None)
