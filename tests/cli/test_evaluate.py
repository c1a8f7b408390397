"""`evaluate` and `generate` as a user runs them, on random weights in a transformers folder."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import yaml

from mambatrain.data.manifest import TokenizerSettings
from mambatrain.data.train_tokenizer import train_tokenizer
from mambatrain.export.exporting import export_weights
from mambatrain.export.transformers_folder import TRANSFORMERS
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection
from mambatrain.runs.weights import Weights

Run = Callable[..., CompletedProcess[str]]
VOCABULARY = 512


@pytest.fixture(scope="module")
def weights(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    section = ModelSection(d_model=16, num_layers=2, vocab_size=VOCABULARY, d_state=8)
    model = LanguageModel(section, choose_backend("torch", torch.device("cpu")))
    initialise(model, section, seed=1)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    folder = tmp_path_factory.mktemp("export") / "weights"
    export_weights(Weights(section, tensors, tiny_shards / "tokenizer.json", "a test", "0" * 64), folder, TRANSFORMERS)
    return folder


@pytest.fixture
def bare(weights: Path, tmp_path: Path) -> Path:
    """The same weights without a tokenizer."""
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((weights / name).read_bytes())
    return tmp_path / "bare"


def failing(result: CompletedProcess[str]) -> str:
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return result.stderr


# Held-out loss


def test_held_out_loss_for_people_and_as_json(
    run_mambatrain: Run, weights: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", weights, "--data", tiny_shards, "--row-tokens", "64", "--max-tokens", "3000"]
    result = run_mambatrain(*arguments, "--out", "report", "--kernels", "torch")
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "report" / "evaluation.json").read_text())["held_out"]
    # Random weights know nothing: each of the 512 ids is about as likely.
    assert numbers["nats_per_token"] == pytest.approx(math.log(VOCABULARY), rel=0.02)
    assert numbers["perplexity"] == pytest.approx(math.exp(numbers["nats_per_token"]))
    bits = numbers["nats_per_token"] * numbers["num_tokens"] / math.log(2) / numbers["num_bytes"]
    assert numbers["bits_per_byte"] == pytest.approx(bits)
    assert f"bits per byte   {bits:.4f}" in result.stdout
    assert sum(one["num_targets"] for one in numbers["by_position"]) == numbers["num_tokens"]
    assert numbers["by_position"][-1]["last"] == 64
    assert (tmp_path / "report" / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")
    assert "kernels  torch" in result.stderr

    again = run_mambatrain(*arguments, "--json", "-", "--kernels", "reference")
    assert json.loads(again.stdout)["held_out"]["nats_per_token"] == pytest.approx(numbers["nats_per_token"], rel=1e-5)
    assert "kernels  reference" in again.stderr


def test_a_run_brings_its_own_text_and_has_the_loss_of_its_log(
    run_mambatrain: Run, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    assert run_mambatrain("pretrain", write_tiny_recipe(), "--run", "run", "--quiet").returncode == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    last = [line for line in logged if line["event"] == "held_out"][-1]
    result = run_mambatrain("evaluate", "run", "--json", "-")
    numbers = json.loads(result.stdout)["held_out"]
    assert numbers["num_tokens"] == last["held_out_tokens"]
    assert numbers["nats_per_token"] == pytest.approx(last["held_out_loss"], rel=1e-5)
    assert numbers["bits_per_byte"] == pytest.approx(last["held_out_bits_per_byte"], rel=1e-5)
    assert "step-00000012" in result.stderr


def test_no_data_is_named_for_weights(run_mambatrain: Run, weights: Path) -> None:
    assert "hint: name some: --data" in failing(run_mambatrain("evaluate", weights))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere", "there is no folder nowhere"),
        ("empty.txt", "empty.txt is a file, not a folder with weights"),
        ("emptydir", "emptydir holds neither recipe.yaml nor config.json"),
    ],
)
def test_what_is_no_weights_is_told_before_anything_else(
    run_mambatrain: Run, tmp_path: Path, where: str, message: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "emptydir").mkdir()
    for options in ([], ["--tasks", "no_such_task"]):
        told = failing(run_mambatrain("evaluate", where, *options))
        assert told.startswith(f"error: {message}")
        assert "hint: name a run, a checkpoint" in told


def test_numbers_that_cannot_be_written_are_an_error(run_mambatrain: Run, weights: Path, tiny_shards: Path) -> None:
    result = run_mambatrain(
        "evaluate", weights, "--data", tiny_shards, "--max-tokens", "100", "--json", "/proc/x/y.json"
    )
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert "error: /proc/x/y.json cannot be written: no such file or directory" in result.stderr
    assert "hint: name a place where files can be written" in result.stderr


@pytest.fixture
def other_tokenizer(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("Quite another text, in quite other words. " * 50)
    train_tokenizer([text], tmp_path / "other.json", TokenizerSettings(vocab_size=300, sample_bytes=10_000))
    return tmp_path / "other.json"


def test_tokens_of_another_tokenizer_are_refused(
    run_mambatrain: Run, weights: Path, bare: Path, tiny_shards: Path, other_tokenizer: Path
) -> None:
    arguments = ["--data", tiny_shards, "--tokenizer", other_tokenizer]
    told = failing(run_mambatrain("evaluate", bare, *arguments))
    assert "tokenized with another tokenizer" in told
    told = failing(run_mambatrain("evaluate", weights, *arguments))
    assert f"--tokenizer {other_tokenizer} is another tokenizer than that of {weights}" in told


def test_another_tokenizer_than_that_of_the_weights_writes_nothing(
    run_mambatrain: Run, weights: Path, other_tokenizer: Path
) -> None:
    told = failing(run_mambatrain("generate", weights, "--prompt", "a", "--tokenizer", other_tokenizer))
    assert f"--tokenizer {other_tokenizer} is another tokenizer than that of {weights}" in told


def test_a_tokenizer_that_was_only_written_anew_is_the_same(
    run_mambatrain: Run, weights: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.json"
    again.write_text(json.dumps(json.loads((tiny_shards / "tokenizer.json").read_text())))
    assert again.read_bytes() != (tiny_shards / "tokenizer.json").read_bytes()
    result = run_mambatrain("evaluate", weights, "--data", tiny_shards, "--tokenizer", again, "--max-tokens", "100")
    assert result.returncode == 0, result.stderr


# Tasks


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'mambatrain[eval]'")
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": f"def f_{n}(): return {n}"}) + "\n" for n in range(5)))
    task: dict[str, Any] = {
        "task": "snippets",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text[:6]}}",
        "doc_to_target": "{{text[6:]}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "snippets.yaml").write_text(yaml.safe_dump(task))
    return tmp_path / "snippets.yaml"


def test_a_task_file(run_mambatrain: Run, weights: Path, task_file: Path, tmp_path: Path) -> None:
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    result = run_mambatrain(
        "evaluate", weights, "--tasks", "snippets.yaml", "--limit", "3", "--json", "scores.json", environment=cache
    )
    assert result.returncode == 0, result.stderr
    header, row = result.stdout.splitlines()
    assert header.split()[:3] == ["task", "metric", "value"]
    assert row.split() == ["snippets", "acc", "0.0000", "↑", "±", "0.0000", "0", "3"]
    (score,) = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    assert (score["task"], score["metric"], score["num_documents"]) == ("snippets", "acc", 3)


def test_a_task_file_that_cannot_be_read_is_named(run_mambatrain: Run, weights: Path, task_file: Path) -> None:
    task_file.write_text(task_file.read_text().replace("documents.jsonl", "missing.jsonl"))
    message = failing(run_mambatrain("evaluate", weights, "--tasks", "snippets.yaml"))
    assert "task snippets.yaml cannot be loaded" in message
    assert "missing.jsonl" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "3"], "of which there are none"),
        (["--tasks", "snippets.yaml", "--task-data", "snippets"], "NAME=FILE"),
        (["--tasks", "snippets.yaml", "--task-data", "snippets=no.jsonl"], "no such file"),
        (["--tasks", "snippets.yaml", "--task-data", "snippets=snippets.yaml"], "the format is not known"),
        (["--tasks", "snippets.yaml", "--task-data", "snipets=documents.jsonl"], "not among --tasks"),
        (["--tasks", "snippets.yaml", "--include-path", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_mistakes_about_tasks(
    run_mambatrain: Run, weights: Path, task_file: Path, arguments: list[str], message: str
) -> None:
    assert message in failing(run_mambatrain("evaluate", weights, *arguments))


def test_without_lm_eval_the_extra_is_named(run_mambatrain: Run, weights: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"  # a package of that name that is not there, in front of one that may be
    hidden.mkdir()
    (hidden / "lm_eval.py").write_text("raise ModuleNotFoundError('No module named lm_eval', name='lm_eval')\n")
    result = run_mambatrain("evaluate", weights, "--tasks", "arc_easy", environment={"PYTHONPATH": str(hidden)})
    assert "pip install 'mambatrain[eval]'" in failing(result)


# Generation


def test_text_on_stdout_and_facts_on_stderr(run_mambatrain: Run, weights: Path) -> None:
    options = ["--prompt", "import os", "--max-new-tokens", "20"]
    first = run_mambatrain("generate", weights, *options, "--seed", "5")
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("\n") and len(first.stdout) > 10
    assert "import os" not in first.stdout
    assert "seed 5" in first.stderr and "tokens/s" in first.stderr
    assert run_mambatrain("generate", weights, *options, "--seed", "5").stdout == first.stdout
    assert run_mambatrain("generate", weights, *options).stdout != first.stdout


def test_a_prompt_from_a_file_and_from_stdin(run_mambatrain: Run, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("naïve", encoding="utf-8")
    options = ["--max-new-tokens", "5", "--temperature", "0"]
    outputs = {
        run_mambatrain("generate", weights, "--prompt", "naïve", *options).stdout,
        run_mambatrain("generate", weights, "--prompt-file", "prompt.txt", *options).stdout,
        run_mambatrain("generate", weights, "--prompt-file", "-", *options, stdin="naïve").stdout,
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--prompt-file", "nowhere.txt"],
            "nowhere.txt cannot be read: No such file or directory\n\nhint: name a text",
        ),
        (["--prompt-file", "latin.txt"], "latin.txt is not UTF-8: byte 2"),
        (["--prompt", "a", "--tokenizer", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_about_prompts(
    run_mambatrain: Run, weights: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    assert message in failing(run_mambatrain("generate", weights, *arguments))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("", "'--prompt' / '--prompt-file': give one of the two"),
        ("--prompt a --prompt-file b", "'--prompt' / '--prompt-file': give one of the two"),
        ("--prompt a --prompt b", "'--prompt': given more than once"),
        ("--prompt a --top-p 7", "'--top-p': 7.0 is not above 0 and at most 1"),
        ("--prompt a --top-p 0", "'--top-p': 0.0 is not above 0 and at most 1"),
        ("--prompt a --min-p -1", "'--min-p': -1.0 is not from 0 to 1"),
        ("--prompt a --repetition-penalty 0", "'--repetition-penalty': 0.0 is not above 0"),
        ("--prompt a --temperature nan", "'--temperature': nan is not 0 or more"),
        ("--prompt a --top-k -1", "'--top-k': "),
        ("--prompt a --seed -1", "'--seed': -1 is not from 0 to 2^63 - 1"),
    ],
)
def test_a_value_out_of_range_names_its_option(run_mambatrain: Run, arguments: str, problem: str) -> None:
    result = run_mambatrain("generate", "weights", *arguments.split())
    assert (result.returncode, result.stdout) == (2, "")
    assert f"Invalid value for {problem}" in result.stderr


def test_weights_without_a_tokenizer(run_mambatrain: Run, bare: Path, tiny_shards: Path) -> None:
    assert "--tokenizer FILE" in failing(run_mambatrain("generate", bare, "--prompt", "a"))
    options = ["--prompt", "a", "--max-new-tokens", "3", "--tokenizer", tiny_shards / "tokenizer.json"]
    assert run_mambatrain("generate", bare, *options).returncode == 0
