"""What our model answers to lm-eval's requests, against lm-eval's `hf` model on the exported folder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'mambatrain[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mambatrain.errors import UserError
from mambatrain.evaluation.harness_model import HarnessModel

END = "<|endoftext|>"


def requests(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def test_likelihoods_of_continuations(pair: tuple[HarnessModel, HFLM], sentences: list[str]) -> None:
    long = " ".join(sentences)
    pairs = [
        ("The cat sat on the", " mat"),
        ("The cat sat on the ", "mat"),  # the space belongs to the continuation
        ("The cat sat on the  \n", "mat"),
        ("Question: what is the", " colour of the sky?"),
        ("", "The dog"),  # behind the end-of-document token
        ("", END + "The dog"),
        (END + "The cat", " sat"),
        ("a " + END + " b", " c"),
        ("naïve café in 日", "本 is"),
        (long, " the end"),  # longer than max_length
        (long, long[:50]),
        ("x", "y"),
    ]
    assert_same_scores(pair, pairs)


def test_every_token_as_a_continuation(pair: tuple[HarnessModel, HFLM]) -> None:
    """Letters behind a number, each a token of its own: they share one row of input, and some are the greedy ones."""
    tokenizer = pair[0].text_tokenizer
    letters = [text for text in (tokenizer.decode([token]) for token in range(1, pair[0].vocab_size)) if text.isalpha()]
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


def test_likelihoods_of_whole_texts(pair: tuple[HarnessModel, HFLM], sentences: list[str]) -> None:
    long = " ".join(sentences)
    texts = [*sentences, long, long * 3, "", "x", END + "x", "  \n"]
    ours, theirs = (
        model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True)
        for model in pair
    )
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_greedy_texts(pair: tuple[HarnessModel, HFLM], sentences: list[str]) -> None:
    long = " ".join(sentences)
    contexts = [*sentences[:2], long, "a", "The cat ", "Once upon"]
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


def test_rows_together_are_as_rows_alone(pair: tuple[HarnessModel, HFLM], sentences: list[str]) -> None:
    ours, _ = pair
    asked = requests("generate_until", [(context, {"until": [], "max_gen_toks": 15}) for context in ["a", *sentences]])
    together = ours.generate_until(asked, disable_tqdm=True)
    assert together == [ours.generate_until([one], disable_tqdm=True)[0] for one in asked]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"until": [], "do_sample": True, "temperature": 0.7}, "random sampling"),
        ({"until": [], "num_beams": 4}, "more than greedy"),
        ({"until": [], "max_gen_toks": 1000}, "no room"),
    ],
)
def test_what_is_not_done_is_refused(pair: tuple[HarnessModel, HFLM], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pair[0].generate_until(requests("generate_until", [("a", arguments)]))


def test_a_context_that_is_too_long_loses_its_beginning(pair: tuple[HarnessModel, HFLM], sentences: list[str]) -> None:
    long = " ".join(sentences)
    ours, _ = pair
    assert ours._generation_context(long, 8) == ours.tok_encode(long)[-(ours.max_length - 8) :]


def test_padding_rows_are_never_generated(pair: tuple[HarnessModel, HFLM]) -> None:
    ours, _ = pair
    weight, vocab_size = ours.model.head_weight, ours.vocab_size
    with torch.no_grad():
        before = weight[vocab_size:].clone()
        weight[vocab_size:] = 100 * weight[5 : 5 + len(before)]
        tokens = ours._continue_greedily([[5, 6], [7]], [END], 20)
        weight[vocab_size:] = before
    assert max(max(row) for row in tokens) < vocab_size
