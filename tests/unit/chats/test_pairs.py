"""Preference pairs: every form becomes the same two conversations, and what is wrong with one is said by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mambatrain.chats.open_chats import chat_lines, open_chats
from mambatrain.chats.pairs import PairFields, ReadPair
from mambatrain.data.open_tokens import open_tokens
from mambatrain.data.text_fields import BadText
from mambatrain.data.token_corpus import TokenCorpus
from mambatrain.data.tokenizer import load_tokenizer
from mambatrain.errors import UserError
from mambatrain.recipe import Recipe, parse_recipe


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be kind"}
PAIR: dict[str, Any] = {"prompt": "hi", "chosen": "hello", "rejected": "go"}
LONGER: dict[str, Any] = {
    "prompt": [user("hi"), said("yes?"), user("who?")],
    "chosen": [said("me")],
    "rejected": [said("you")],
}


def read(row: dict[str, Any], **how: Any) -> ReadPair:
    text = PairFields(**how).text_of(row)
    assert isinstance(text, str), text
    return ReadPair.from_text(text)


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"question": "hi", "chosen": "hello", "rejected": "go"},
        {"prompt": [user("hi")], "chosen": [said("hello")], "rejected": [said("go")]},
        {"prompt": "hi", "chosen": [said("hello")], "rejected": "go"},
        {"chosen": [user("hi"), said("hello")], "rejected": [user("hi"), said("go")]},
        {"prompt": "hi", "chosen": [user("hi"), said("hello")], "rejected": [user("hi"), said("go")], "score": 3},
        {"prompt": "hi", "chosen": json.dumps([said("hello")]), "rejected": [json.dumps(said("go"))]},
    ],
)
def test_every_form_is_the_same_pair(row: dict[str, Any]) -> None:
    pair = read(row)
    assert [chat.messages for chat in (pair.chosen, pair.rejected)] == [
        [user("hi"), said("hello")],
        [user("hi"), said("go")],
    ]
    assert [chat.counts for chat in (pair.chosen, pair.rejected)] == [[False, None]] * 2


def test_nothing_of_the_prompt_counts_and_an_answer_may_be_several_turns() -> None:
    pair = read(LONGER)
    assert pair.chosen.counts == pair.rejected.counts == [False, False, False, None]
    both = [user("hi"), said("yes?"), user("who?")]
    whole = {"chosen": [*both, said("me"), user("why?"), said("so")], "rejected": [*both, said("you")]}
    pair = read(whole)
    assert pair.chosen.counts == [False, False, False, None, None, None]
    assert pair.rejected.messages == [*both, said("you")]
    assert read({**PAIR, "system": "be kind"}).chosen.messages[0] == SYSTEM
    assert read({**whole, "system": "be kind"}).rejected.messages[:2] == [SYSTEM, user("hi")]
    assert read({"q": "hi", "chosen": "a", "rejected": "b"}, prompt_field="q").chosen.messages[0] == user("hi")
    assert read({**PAIR, "chosen": "[1, 2]"}).chosen.messages[1] == said("[1, 2]")  # a text that looks like a list


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIR, "rejected": "hello"}, "has equal answers: chosen and rejected are the same"),
        ({**PAIR, "rejected": " hello\n"}, "has equal answers"),
        ({"chosen": [user("hi"), said("x")], "rejected": [user("hi"), said("x")]}, "has equal answers"),
        ({**PAIR, "rejected": ""}, "has an empty completion: message 2 of the assistant holds no text (prompt and `r"),
        ({**PAIR, "chosen": None}, "has no `chosen`, its fields are prompt, chosen, rejected"),
        ({"chosen": "hello", "rejected": "go"}, "has no prompt or question, only answers"),
        ({**PAIR, "chosen": [user("hi")]}, "has no turn of the assistant in `chosen`"),
        (
            {"chosen": [user("hi"), said("x")], "rejected": [user("ho"), said("y")]},
            "has other prompts in chosen and rejected: message 1 differs and is of user in `chosen`",
        ),
        (
            {"prompt": "he", "chosen": [user("hi"), said("x")], "rejected": [user("hi"), said("y")]},
            "has a prompt that is not what chosen and rejected begin with",
        ),
        (
            {"chosen": [user("hi"), said("x")], "rejected": [user("hi"), said("x"), user("y"), said("z")]},
            "has no answer in `chosen`: it ends where both are still the same",
        ),
        ({**PAIR, "prompt": [user("hi"), said("yes?")]}, "has its roles out of order: message 3 is of assistant"),
        ({**PAIR, "chosen": 3}, "holds a number in `chosen`"),
        ({**PAIR, "tools": [{}]}, "holds tools that may be called"),
    ],
)
def test_what_is_wrong_is_said(row: dict[str, Any], reason: str) -> None:
    bad = PairFields().text_of(row)
    assert isinstance(bad, BadText) and reason in bad.reason, bad


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(rows: list[Any]) -> Path:
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write


def recipe_of(file: Path, tiny_shards: Path, row_tokens: int = 64, **chats: Any) -> Recipe:
    section = {"files": [str(file)], "format": "preference", "tokenizer": str(tiny_shards / "tokenizer.json")}
    content = {
        "model": {"d_model": 8, "num_layers": 1, "vocab_size": 520},
        "data": {"chats": {**section, "held_out": 0.2, **chats}, "row_tokens": row_tokens},
        "training": {"rows_per_step": 2, "total_steps": 4},
        "optimizer": {"learning_rate": 1e-3},
        "preferences": {},
    }
    return parse_recipe(content, "a test")


def texts_of(corpus: TokenCorpus, split: str) -> list[tuple[str, str]]:
    """Text, and counted text, of each conversation."""
    loaded, shard = load_tokenizer(corpus.tokenizer_file), getattr(corpus, split)
    starts, lengths = shard.document_starts, shard.document_lengths
    ids = [shard.document(number) for number in range(shard.num_documents)]
    counted = [shard.counted[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    return [(loaded.decode(one), loaded.decode(one[where])) for one, where in zip(ids, counted, strict=True)]


def test_a_folder_holds_chosen_and_rejected_in_turn_and_holds_out_whole_pairs(
    tmp_path: Path, tiny_shards: Path, write: Any
) -> None:
    rows = [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(10)]
    corpus = open_chats(recipe_of(write(rows), tiny_shards), None, tmp_path / "out")
    assert (corpus.train.num_documents, corpus.held_out.num_documents) == (16, 4)
    found = [*texts_of(corpus, "train"), *texts_of(corpus, "held_out")]
    numbers = []
    for (chosen, good), (rejected, bad) in zip(found[::2], found[1::2], strict=True):
        number = good.removeprefix("good ").removesuffix("<|endoftext|>")
        numbers.append(int(number))
        assert (good, bad) == (f"good {number}<|endoftext|>", f"bad {number}<|endoftext|>")
        assert chosen.replace("good", "bad") == rejected and f"question {number}" in chosen
    assert sorted(numbers) == list(range(10)) != numbers
    assert next(chat_lines(corpus)) == "10 preference pairs in the template plain; 2 are held out"
    assert open_tokens(tmp_path / "out").holds_pairs


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({**PAIR, "rejected": "hello"}, "pairs.jsonl:2 has equal answers: chosen and rejected are the same"),
        (
            {"prompt": "hi", "chosen": [user("hi")], "rejected": "x"},
            "pairs.jsonl:2 has no turn of the assistant in `chosen`",
        ),
        ({"messages": [user("hi"), said("hello")]}, "pairs.jsonl:2 has no `chosen`, its fields are messages"),
    ],
)
def test_bad_pairs_are_named_by_line_and_left_out_when_asked(
    row: dict[str, Any], told: str, tmp_path: Path, tiny_shards: Path, write: Any
) -> None:
    file = write([PAIR, row, LONGER, row])
    with pytest.raises(UserError) as error:
        open_chats(recipe_of(file, tiny_shards, 128), None, tmp_path / "out")
    assert told in error.value.message
    assert "data.chats.skip_bad=true leaves such pairs out and counts them" in str(error.value.hint)
    corpus = open_chats(recipe_of(file, tiny_shards, 128, skip_bad=True), None, tmp_path / "out")
    assert (corpus.manifest.num_skipped_bad, corpus.train.num_documents + corpus.held_out.num_documents) == (2, 4)
    assert any("2 preference pairs were left out as bad; the first: " in line for line in chat_lines(corpus))


def test_a_pair_that_is_longer_than_a_row_is_cut_left_out_or_refused(
    tmp_path: Path, tiny_shards: Path, write: Any
) -> None:
    file = write([PAIR, {"prompt": "hi", "chosen": "word " * 40, "rejected": "no"}, PAIR])
    with pytest.raises(UserError, match=r"pairs.jsonl:2 has two answers that fill \d+ positions .*, and a row has 64"):
        open_chats(recipe_of(file, tiny_shards, too_long="refuse"), None, tmp_path / "out")
    corpus = open_chats(recipe_of(file, tiny_shards, too_long="skip", held_out=0.0), None, tmp_path / "out")
    assert (corpus.train.num_documents, corpus.manifest.chats and corpus.manifest.chats.num_too_long) == (4, 1)
    corpus = open_chats(recipe_of(file, tiny_shards, held_out=0.0), None, tmp_path / "out")
    lengths = corpus.train.document_lengths
    filled = lengths[::2] + lengths[1::2] - 2
    assert (len(lengths), filled.max()) == (6, 64)  # the rejected answer is whole, the chosen one has what is left
    (long,) = [n for n in range(6) if corpus.train.document_lengths[n] > 33]
    assert texts_of(corpus, "train")[long + 1][1] == "no<|endoftext|>"
    both = write([PAIR, {"prompt": "hi", "chosen": "word " * 40, "rejected": "other " * 40}])
    lengths = open_chats(recipe_of(both, tiny_shards, held_out=0.0), None, tmp_path / "out").train.document_lengths
    assert sorted(lengths.tolist())[2:] == [33, 33]
    late = write([PAIR, {"prompt": "hi", "chosen": "word " * 40 + "yes", "rejected": "word " * 40 + "no"}])
    with pytest.raises(UserError, match="has answers that differ behind what a row of 64 shows of them alone"):
        open_chats(recipe_of(late, tiny_shards), None, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preferences": None}, "data.chats.format preference needs a preferences section"),
        ({"data.chats.format": "messages"}, "preferences are learned from data.chats of format preference"),
        ({"adapter": {"kind": "state"}}, "adapter.kind state does not go with preferences"),
        ({"data.packing": "best_fit"}, "data.packing does not go with preferences"),
        ({"data.held_out": "x"}, "data.held_out does not go with preferences"),
        ({"data.chats.completion_field": "x"}, "completion_field belongs to format prompt_completion"),
        ({"preferences.beta": 0}, "preferences.beta: input should be greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], said: str, tiny_shards: Path) -> None:
    content = recipe_of(Path("pairs.jsonl"), tiny_shards).model_dump(mode="json", exclude_unset=True)
    for path, value in changes.items():
        *places, name = path.split(".")
        section = content
        for place in places:
            section = section[place]
        section[name] = value
    with pytest.raises(UserError) as error:
        parse_recipe(content, "a test")
    assert said in error.value.message
