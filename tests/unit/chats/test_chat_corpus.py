"""Folders of conversations: what is in them, what is refused by file and line, what is made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambatrain.chats.open_chats import chat_lines, open_chats
from mambatrain.data.check_tokens import check_tokens
from mambatrain.data.combine_tokens import split_tokens
from mambatrain.data.inspect_tokens import inspect_tokens
from mambatrain.data.open_tokens import open_tokens
from mambatrain.data.token_corpus import TokenCorpus, verify_token_corpus
from mambatrain.data.tokenizer import load_tokenizer
from mambatrain.data.training_data import open_training_data
from mambatrain.errors import UserError
from mambatrain.recipe import Recipe, parse_recipe


def chat(*turns: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)], **more}


CHATS = [chat(f"question {n}", f"answer {n}") for n in range(20)]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(rows: list[Any], name: str = "chats.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return file

    return write


def recipe_of(file: Path | str, tiny_shards: Path, row_tokens: int = 64, **chats: Any) -> Recipe:
    section = {"files": [str(file)], "tokenizer": str(tiny_shards / "tokenizer.json"), "held_out": 0.1, **chats}
    content = {
        "model": {"d_model": 8, "num_layers": 1, "vocab_size": 520},
        "data": {"chats": section, "row_tokens": row_tokens},
        "training": {"rows_per_step": 2, "total_steps": 4},
        "optimizer": {"learning_rate": 1e-3},
    }
    return parse_recipe(content, "a test")


def texts_of(corpus: TokenCorpus, split: str = "train") -> list[tuple[str, str]]:
    """Text, and counted text, of each conversation."""
    loaded = load_tokenizer(corpus.tokenizer_file)
    shard = getattr(corpus, split)
    texts = []
    for number in range(shard.num_documents):
        ids, start = shard.document(number), int(shard.document_starts[number])
        texts.append((loaded.decode(ids), loaded.decode(ids[shard.counted[start : start + len(ids)]])))
    return texts


def test_a_folder_holds_every_conversation_once_as_the_template_shows_it(
    tmp_path: Path, tiny_shards: Path, write: Any
) -> None:
    corpus = open_chats(recipe_of(write(CHATS), tiny_shards), None, tmp_path / "out")
    everything = texts_of(corpus) + texts_of(corpus, "held_out")
    expected = [
        (f"<|endoftext|>User:\nquestion {n}\n\nAssistant:\nanswer {n}<|endoftext|>\n\n", f"answer {n}<|endoftext|>")
        for n in range(20)
    ]
    assert sorted(everything) == sorted(expected)
    assert everything != expected  # held out at random
    assert (corpus.train.num_documents, corpus.held_out.num_documents) == (18, 2)
    assert corpus.train_bytes.tolist() == [len(counted) - len("<|endoftext|>") for _, counted in texts_of(corpus)]
    verify_token_corpus(corpus)
    tokens = open_tokens(tmp_path / "out")
    assert not check_tokens(tokens).problems
    assert inspect_tokens(tokens)["train"].num_documents == 18


def test_packed_rows_hold_whole_conversations_and_count_what_counts(
    tmp_path: Path, tiny_shards: Path, write: Any
) -> None:
    recipe = recipe_of(write(CHATS), tiny_shards)
    corpus = open_chats(recipe, None, tmp_path / "out")
    data = open_training_data(recipe, chats=tmp_path / "out")
    windows = data.order.stages[0].sources[0].windows
    batch = windows.rows(np.arange(windows.num_windows))
    assert windows.num_windows < 18
    assert int(batch.boundaries.sum()) == 18
    assert int((batch.targets >= 0).sum()) == windows.num_targets == int(corpus.train.counted.sum())  # type: ignore[union-attr]
    assert data.held_out is not None and data.held_out.num_documents == 2
    assert data.held_out.num_targets == int(corpus.held_out.counted.sum())  # type: ignore[union-attr]
    assert data.held_out.num_bytes == int(corpus.held_out_bytes.sum())


def test_it_is_made_once_and_again_when_something_changed(tmp_path: Path, tiny_shards: Path, write: Any) -> None:
    file, out = write(CHATS), tmp_path / "out"
    first = open_chats(recipe_of(file, tiny_shards), None, out)
    before = (out / "manifest.json").stat().st_mtime_ns
    again = open_chats(recipe_of(file, tiny_shards), None, out)
    assert (out / "manifest.json").stat().st_mtime_ns == before and again.digest == first.digest
    renamed = open_chats(recipe_of(file.rename(tmp_path / "renamed.jsonl"), tiny_shards), None, out)
    assert renamed.digest == first.digest and (out / "manifest.json").stat().st_mtime_ns == before
    file = tmp_path / "renamed.jsonl"
    digests = {first.digest}
    for change in ({"seed": 1}, {"count": ["user"]}, {"template": "raw"}, {"new_tokens": ["<a>"]}, {"held_out": 0.2}):
        digests.add(open_chats(recipe_of(file, tiny_shards, **change), None, out).digest)
    digests.add(open_chats(recipe_of(write([*CHATS, chat("a", "b")]), tiny_shards), None, out).digest)
    assert len(digests) >= 6  # a token that no text holds changes no id
    mine = tmp_path / "mine.jinja"
    for source in ("{% generation %}{{ messages[1].content }}{% endgeneration %}.", "."):  # of one name
        mine.write_text("{{ bos_token }}{% generation %}{{ messages[1].content }}{% endgeneration %}" + source)
        corpus = open_chats(recipe_of(file, tiny_shards, template=str(mine)), None, out)
        assert texts_of(corpus)[0][0].endswith(".") and corpus.digest not in digests
        digests.add(corpus.digest)
    wide = open_chats(recipe_of(file, tiny_shards, row_tokens=65), None, out).manifest.chats
    assert wide is not None and wide.row_tokens == 65
    (out / "train.counted.npy").write_bytes(b"damaged")
    assert open_chats(recipe_of(file, tiny_shards), None, out).digest == first.digest
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a folder of conversations"):
        open_chats(recipe_of(file, tiny_shards), None, out)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "is not JSON"),
        (chat("alone"), "has no turn of the assistant"),
        (chat("a", ""), "has an empty completion"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "has its roles out of order"),
        ({"something": "else"}, "has no conversation: its fields are something"),
        (chat("long " * 200, "cut off"), "has no counted token among its first 65, all that a row shows"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
         "has no message that counts"),
    ],
)  # fmt: skip
def test_a_bad_conversation_is_named_by_line_and_left_out_only_when_asked(
    tmp_path: Path, tiny_shards: Path, write: Any, bad: Any, reason: str
) -> None:
    file = write([*CHATS[:2], bad, *CHATS[2:4]])
    with pytest.raises(UserError) as told:
        open_chats(recipe_of(file, tiny_shards), None, tmp_path / "out")
    assert told.value.message.startswith(f"{file}:3 {reason}")
    assert "data.chats.skip_bad=true leaves such conversations out" in str(told.value.hint)
    assert not (tmp_path / "out").exists()
    corpus = open_chats(recipe_of(file, tiny_shards, skip_bad=True), None, tmp_path / "out")
    assert corpus.manifest.num_skipped_bad == 1
    assert corpus.train.num_documents + corpus.held_out.num_documents == 4
    assert f"1 conversations were left out as bad; the first: {file}:3 {reason}" in "\n".join(chat_lines(corpus))


def test_a_template_that_fails_is_named_with_its_line_and_the_conversations(
    tmp_path: Path, tiny_shards: Path, write: Any
) -> None:
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}\n{% if m.content == 'question 1' %}{{ raise_exception('not this one') }}{% endif %}\n"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    )
    file = write(CHATS)
    mine = str(tmp_path / "mine.jinja")
    with pytest.raises(UserError, match=rf"{file}:2 cannot be shown: .*mine.jinja failed in line 2: not this one"):
        open_chats(recipe_of(file, tiny_shards, template=mine), None, tmp_path / "out")
    corpus = open_chats(recipe_of(file, tiny_shards, template=mine, skip_bad=True), None, tmp_path / "out")
    assert corpus.manifest.num_skipped_bad == 1
    (tmp_path / "mine.jinja").write_text("{% for %}")
    for skip in (False, True):  # no conversation's fault
        with pytest.raises(UserError, match=r"^the chat template \S+mine.jinja is wrong in line 1") as told:
            open_chats(recipe_of(file, tiny_shards, template=mine, skip_bad=skip), None, tmp_path / "out")
        assert told.value.hint == "mend it"


def test_what_is_longer_than_a_row_is_cut_left_out_or_refused(tmp_path: Path, tiny_shards: Path, write: Any) -> None:
    long = chat("why", "word " * 200)
    file, out = write([*CHATS[:3], long]), tmp_path / "out"
    cut = open_chats(recipe_of(file, tiny_shards, held_out=0.0), None, out)
    record = cut.manifest.chats
    assert record is not None and record.num_truncated == 1 and record.num_counted_cut > 100
    assert int(cut.train.document_lengths.max()) == 65
    told = "\n".join(chat_lines(cut))
    assert f"1 conversations were longer than a row of 64 and lost their ends with {record.num_counted_cut}" in told
    assert f"the first: {file}:4" in told
    skipped = open_chats(recipe_of(file, tiny_shards, held_out=0.0, too_long="skip"), None, out)
    assert skipped.train.num_documents == 3
    assert f"1 conversations were left out for length; the first: {file}:4" in "\n".join(chat_lines(skipped))
    with pytest.raises(UserError, match=rf"{file}:4 has [\d,]+ tokens, and a row shows 65"):
        open_chats(recipe_of(file, tiny_shards, too_long="refuse"), None, out)


def test_tokens_that_the_template_writes_have_to_be_tokens(tmp_path: Path, tiny_shards: Path, write: Any) -> None:
    file = write(CHATS)
    new = ["<|im_start|>", "<|im_end|>"]
    with pytest.raises(UserError, match=r"chatml writes tokens that .* does not have: <\|im_start\|>") as told:
        open_chats(recipe_of(file, tiny_shards, template="chatml"), None, tmp_path / "out")
    assert 'new_tokens: ["<|im_start|>", "<|im_end|>"] adds them' in str(told.value.hint)
    corpus = open_chats(recipe_of(file, tiny_shards, template="chatml", new_tokens=new), None, tmp_path / "out")
    assert all(counted.endswith("<|im_end|>") for _, counted in texts_of(corpus))
    (tmp_path / "mine.jinja").write_text("{% generation %}<|eot|>{% endgeneration %}")
    with pytest.raises(UserError, match=r"writes tokens that .* does not have: <\|eot\|>"):
        open_chats(recipe_of(file, tiny_shards, template=str(tmp_path / "mine.jinja")), None, tmp_path / "out")


def test_what_does_not_go_with_conversations_is_refused(tmp_path: Path, tiny_shards: Path, write: Any) -> None:
    file, out = write([*CHATS, chat("why", "word " * 90)]), tmp_path / "out"
    recipe = recipe_of(file, tiny_shards, row_tokens=256)
    open_chats(recipe, None, out)
    with pytest.raises(UserError, match="holds conversations, which are not merged or split"):
        split_tokens(out, 0.1, tmp_path / "split")

    def of_shards(**data: Any) -> Recipe:
        content = recipe.model_dump(mode="json")
        content["data"] = {"shards": str(out), "row_tokens": 256, **data}
        return parse_recipe(content, "a test")

    open_training_data(of_shards())  # a folder of conversations is a folder of tokens
    with pytest.raises(UserError, match="windows would cut the conversations"):
        open_training_data(of_shards(packing="windows"))
    with pytest.raises(UserError, match=r"conversations of up to [\d,]+ tokens, and a row shows 65"):
        open_training_data(of_shards(row_tokens=64))
    with pytest.raises(UserError, match="no tokenizer lies beside the weights"):
        open_chats(recipe_of(file, tiny_shards, tokenizer=None), None, out)
    text = write(["hello"], "a.txt")
    with pytest.raises(UserError, match=r"a.txt holds text, not conversations"):
        open_chats(recipe_of(text, tiny_shards), None, out)
    with pytest.raises(UserError, match="hold no conversation that can be used"):
        open_chats(recipe_of(write([{"a": 1}], "none.jsonl"), tiny_shards, skip_bad=True), None, out)


def test_data_sets_and_tables_are_read_as_lines_are(tmp_path: Path, tiny_shards: Path, write: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [chat(f"question {n}", f"answer {n}", weight=1.0) for n in range(5)]
    rows[0]["messages"][1]["train"] = True  # the others have null in its place
    folder = tmp_path / "set"
    folder.mkdir()
    write(rows, "set/train.jsonl")
    (tmp_path / "list.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    expected = None
    for number, name in enumerate((f"hf://{folder}", str(tmp_path / "list.json"), str(tmp_path / "table.parquet"))):
        corpus = open_chats(recipe_of(name, tiny_shards), None, tmp_path / f"out-{number}")
        expected = expected or corpus.digest
        assert corpus.digest == expected
        assert corpus.manifest.chats is not None and corpus.manifest.chats.formats == {"messages": 5}
    rows[2]["messages"][1]["content"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"bad.parquet:3 holds null in `content of message 2`"):
        open_chats(recipe_of(tmp_path / "bad.parquet", tiny_shards), None, tmp_path / "out")
