"""Scores on our own model against lm-eval's `hf` model on the exported folder: requests, tasks, texts."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'mambatrain[eval]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mambatrain.errors import UserError
from mambatrain.evaluation.harness import BOOTSTRAPS, TaskScore, load_tasks, score_tasks
from mambatrain.evaluation.harness_model import HarnessModel
from mambatrain.export.exporting import export_weights
from mambatrain.export.transformers_folder import TRANSFORMERS
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection
from mambatrain.runs.weights import Weights, build_model

VOCABULARY = 300  # the embedding is padded to 304 rows
END = "<|endoftext|>"
MAX_LENGTH = 40  # short, so that requests exceed it
SENTENCES = [
    "The cat sat on the mat, and the dog lay by the door.",
    "Question: what is the colour of the sky? Answer: it is blue.",
    "Once upon a time there was a naïve café owner in 日本.",
    "It rained for days; nobody went out, and nothing was said.",
]
EVAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "eval"


@pytest.fixture(scope="module", autouse=True)
def own_dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def train_tokenizer(file: Path, opens_texts: bool) -> Path:
    """A byte-level BPE; one that `opens_texts` puts the end-of-document token in front of what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    if opens_texts:
        end = tokenizer.token_to_id(END)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, end)])
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module", params=["mamba1", "mamba2", "mamba1 with opened texts"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[HarnessModel, HFLM]:
    """One random model, ours in process and theirs from the exported folder."""
    block, _, opened = request.param.partition(" ")
    tokenizer_file = train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", bool(opened))
    widths: dict[str, Any] = {"head_dim": 16, "d_state": 16} if block == "mamba2" else {}
    section = ModelSection(block=block, d_model=32, num_layers=2, vocab_size=VOCABULARY, tie_embeddings=False, **widths)
    backend = choose_backend("torch", torch.device("cpu"))
    random = LanguageModel(section, backend)
    initialise(random, section, seed=1)
    tensors = {name: parameter.detach().clone() for name, parameter in random.named_parameters()}
    # Likelihoods that differ, and padding rows that have a part of them but are never the likeliest.
    tensors["embedding.weight"].normal_(generator=torch.Generator().manual_seed(2))
    tensors["lm_head.weight"].normal_(generator=torch.Generator().manual_seed(3))
    tensors["lm_head.weight"][VOCABULARY:] = 0.9 * tensors["lm_head.weight"][: -VOCABULARY % 8]
    for name, tensor in tensors.items():
        if name.endswith("out_proj.weight"):
            tensor.mul_(10)  # what was read before the last token counts
    weights = Weights(section, tensors, tokenizer_file, "a test", "0" * 64)
    folder = tmp_path_factory.mktemp("export") / "folder"
    export_weights(weights, folder, TRANSFORMERS)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.encode_special_tokens = True  # as the trainer's tokenizer is set
    end = tokenizer.token_to_id(END)
    ours = HarnessModel(
        build_model(weights, backend, "cpu"), tokenizer, end, VOCABULARY, max_length=MAX_LENGTH, batch_rows=4
    )
    logging.disable(logging.WARNING)  # remarks of lm-eval and transformers
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=MAX_LENGTH, batch_size=3)
    logging.disable(logging.NOTSET)
    return ours, theirs


def requests(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


LONG = " ".join(SENTENCES)
PAIRS = [
    ("The cat sat on the", " mat"),
    ("The cat sat on the ", "mat"),  # the space belongs to the continuation
    ("The cat sat on the  \n", "mat"),
    ("Question: what is the", " colour of the sky?"),
    ("", "The dog"),  # behind the end-of-document token
    ("", END + "The dog"),
    (END + "The cat", " sat"),
    ("a " + END + " b", " c"),
    ("naïve café in 日", "本 is"),
    (LONG, " the end"),  # longer than max_length
    (LONG, LONG[:50]),
    ("x", "y"),
]


def test_likelihoods_of_continuations(pair: tuple[HarnessModel, HFLM]) -> None:
    assert_same_scores(pair, PAIRS)


def test_every_token_as_a_continuation(pair: tuple[HarnessModel, HFLM]) -> None:
    """Letters behind a number, each a token of its own: they share one row of input, and some are the greedy ones."""
    tokenizer = pair[0].text_tokenizer
    letters = [text for text in (tokenizer.decode([token]) for token in range(1, VOCABULARY)) if text.isalpha()]
    pairs = [(str(number), text) for number in range(20) for text in letters]
    assert any(greedy for _, greedy in assert_same_scores(pair, pairs))


def assert_same_scores(pair: tuple[HarnessModel, HFLM], pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    ours, theirs = (model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True) for model in pair)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], rel=1e-5, abs=1e-5)
    return ours


def test_a_continuation_that_melts_into_its_context_is_named(pair: tuple[HarnessModel, HFLM]) -> None:
    """Where `s` and `se` are tokens, `e` behind `s` has none of its own; lm-eval's own model asserts."""
    known = pair[0].text_tokenizer.get_vocab()
    word = next(word for word in known if word.isascii() and word.isalpha() and word[:-1] in known)
    with pytest.raises(UserError, match=f"'{word[-1]}' has 0 tokens"):
        pair[0].loglikelihood(requests("loglikelihood", [(word[:-1], word[-1])]))


def test_likelihoods_of_whole_texts(pair: tuple[HarnessModel, HFLM]) -> None:
    texts = [*SENTENCES, LONG, LONG * 3, "", "x", END + "x", "  \n"]
    ours, theirs = (
        model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True)
        for model in pair
    )
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_greedy_texts(pair: tuple[HarnessModel, HFLM]) -> None:
    contexts = [*SENTENCES[:2], LONG, "a", "The cat ", "Once upon"]
    arguments: list[tuple[str, dict[str, Any]]] = []
    for context in contexts:
        arguments.append((context, {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}))
        arguments.append((context, {"until": ["e", "a"], "max_gen_toks": 12, "temperature": 0.0}))
    ours, theirs = (model.generate_until(requests("generate_until", arguments), disable_tqdm=True) for model in pair)
    assert ours == theirs
    # Of several texts lm-eval's model asks the first alone whether they are opened already: so one alone here.
    alone = requests("generate_until", [(END + "The", {"until": [], "max_gen_toks": 8})])
    assert pair[0].generate_until(alone, disable_tqdm=True) == pair[1].generate_until(alone, disable_tqdm=True)
    assert len(set(ours)) > len(contexts) + 3, "these texts should differ, or this test shows nothing"


def test_rows_together_are_as_rows_alone(pair: tuple[HarnessModel, HFLM]) -> None:
    ours, _ = pair
    asked = requests("generate_until", [(context, {"until": [], "max_gen_toks": 15}) for context in ["a", *SENTENCES]])
    together = ours.generate_until(asked, disable_tqdm=True)
    assert together == [ours.generate_until([one], disable_tqdm=True)[0] for one in asked]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"until": [], "do_sample": True, "temperature": 0.7}, "random sampling"),
        ({"until": [], "num_beams": 4}, "more than greedy"),
        ({"until": [], "max_gen_toks": MAX_LENGTH}, "no room"),
    ],
)
def test_what_is_not_done_is_refused(pair: tuple[HarnessModel, HFLM], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pair[0].generate_until(requests("generate_until", [("a", arguments)]))


def test_a_context_that_is_too_long_loses_its_beginning(pair: tuple[HarnessModel, HFLM]) -> None:
    ours, _ = pair
    assert ours._generation_context(LONG, 8) == ours.tok_encode(LONG)[-(MAX_LENGTH - 8) :]


def test_padding_rows_are_never_generated(pair: tuple[HarnessModel, HFLM]) -> None:
    ours, _ = pair
    weight = ours.model.head_weight
    with torch.no_grad():
        before = weight[VOCABULARY:].clone()
        weight[VOCABULARY:] = 100 * weight[5 : 5 + len(before)]
        tokens = ours._continue_greedily([[5, 6], [7]], [END], 20)
        weight[VOCABULARY:] = before
    assert max(max(row) for row in tokens) < VOCABULARY


# Tasks


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
def task_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"text": text, "question": text[:20], "choices": ["blue", " the mat", "日本"], "answer": index % 3}
        for index, text in enumerate([*SENTENCES, LONG])
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
