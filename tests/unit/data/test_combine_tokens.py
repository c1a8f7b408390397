from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mambatrain.data.check_tokens import check_tokens
from mambatrain.data.combine_tokens import merge_tokens, split_tokens
from mambatrain.data.manifest import TokenizeOptions
from mambatrain.data.open_tokens import Tokens, open_tokens
from mambatrain.data.token_shards import TokenShard, TokenShardWriter
from mambatrain.data.tokenize_corpus import tokenize_corpus
from mambatrain.errors import UserError

Documents = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    made = {}
    for name, count in (("cats", 30), ("dogs", 12)):
        source = folder / f"{name}.jsonl"
        texts = [*(f"{name} number {n}" for n in range(count)), " "]  # the last is left out, and counted
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokenize_corpus([source], byte_tokenizer, folder / name, TokenizeOptions(held_out=0.2))
        made[name] = folder / name
    return made


def documents_of(shard: TokenShard | None) -> Documents:
    assert shard is not None
    return [tuple(shard.document(index).tolist()) for index in range(shard.num_opening, shard.num_documents)]


def write_pair(prefix: Path, documents: Documents) -> Path:
    with TokenShardWriter(prefix, np.dtype("<u2")) as writer:
        for document in documents:
            writer.append(np.array(document, dtype=np.int64))
    return prefix


def test_a_merge_holds_every_document_of_its_parts_once(parts: dict[str, Path], tmp_path: Path) -> None:
    merged = merge_tokens(list(parts.values()), tmp_path / "both")
    assert merged.corpus is not None
    opened = [open_tokens(part) for part in parts.values()]
    for split in ("train", "held_out"):
        expected = [documents_of(part.shards[split]) for part in opened]
        got = documents_of(merged.shards[split])
        assert Counter(got) == Counter(expected[0] + expected[1])
        for part in expected:  # each in its own order
            assert [document for document in got if document in set(part)] == part
    manifest = merged.corpus.manifest
    assert [record.file for record in manifest.sources] == [
        record.file for part in opened if part.corpus for record in part.corpus.manifest.sources
    ]
    assert manifest.combined is not None
    assert [part.digest for part in manifest.combined.parts] == [part.digest for part in opened]
    assert (manifest.train.num_documents, manifest.held_out.num_documents) == (24 + 9, 6 + 3)
    assert manifest.num_skipped_empty == 2
    assert check_tokens(merged).num_problems == 0


def test_bytes_of_text_go_with_their_documents(parts: dict[str, Path], tmp_path: Path) -> None:
    known: dict[tuple[int, ...], int] = {}
    opened = [open_tokens(part) for part in parts.values()]
    for tokens in [*opened, merge_tokens(list(parts.values()), tmp_path / "m")]:
        for split, shard in tokens.shards.items():
            sizes = tokens.text_bytes(split)
            assert sizes is not None
            assert sizes[0] == 0
            for document, size in zip(documents_of(shard), sizes[1:].tolist(), strict=True):
                assert known.setdefault(document, size) == size
    assert len(set(known.values())) > 1


def test_parts_alternate(parts: dict[str, Path], tmp_path: Path) -> None:
    cats = set(documents_of(open_tokens(parts["cats"]).train))
    orders = []
    for seed in (0, 1, 0):
        merged = merge_tokens(list(parts.values()), tmp_path / f"m{len(orders)}", seed=seed)
        orders.append([document in cats for document in documents_of(merged.train)])
    assert orders[0] == orders[2] != orders[1]
    assert 0 < sum(orders[0][:16]) < 16  # both within the first half


def test_a_split_deals_every_document_once(parts: dict[str, Path], tmp_path: Path) -> None:
    before = open_tokens(parts["cats"])
    after = split_tokens(parts["cats"], 0.25, tmp_path / "split", seed=4)
    everything = documents_of(before.train) + documents_of(before.held_out)
    kept, held_out = documents_of(after.train), documents_of(after.held_out)
    assert len(held_out) == 8  # a quarter of 30, rounded up
    assert Counter(kept + held_out) == Counter(everything)
    assert kept == [document for document in everything if document in set(kept)]  # in their order
    assert check_tokens(after).num_problems == 0
    again = split_tokens(parts["cats"], 0.25, tmp_path / "again", seed=5)
    assert documents_of(again.held_out) != held_out
    assert after.corpus is not None
    assert after.corpus.manifest.combined is not None
    assert (after.corpus.manifest.combined.verb, after.corpus.manifest.combined.held_out) == ("split", 0.25)


@pytest.mark.parametrize("end", [(0,), ()], ids=["with end tokens", "without"])
def test_bare_pairs_are_split_and_merged_too(tmp_path: Path, end: tuple[int, ...]) -> None:
    documents: Documents = [(n, n + 1, *end) for n in range(1, 11)]
    one, other = write_pair(tmp_path / "p", documents), write_pair(tmp_path / "q", [(50, 60, *end), (70, *end)])
    split = split_tokens(one, 0.3, tmp_path / "split")
    assert Counter(documents_of(split.train) + documents_of(split.held_out)) == Counter(documents)
    assert len(documents_of(split.held_out)) == 3
    assert (split.corpus, split.train.ends_marked) == (None, bool(end))
    merged = merge_tokens([one, other], tmp_path / "merged")
    assert Counter(documents_of(merged.train)) == Counter([*documents, (50, 60, *end), (70, *end)])
    assert merged.held_out is None


def test_what_does_not_fit_is_refused(parts: dict[str, Path], tiny_shards: Path, tmp_path: Path) -> None:
    def refusal(*folders: Path) -> str:
        with pytest.raises(UserError) as caught:
            merge_tokens(list(folders), tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))
        return caught.value.message

    cats = parts["cats"]
    assert "is named twice" in refusal(cats, cats.parent / "." / "cats")
    assert "1 folder cannot be merged" in refusal(cats)
    assert "was tokenized with another tokenizer than" in refusal(cats, tiny_shards)
    pair = write_pair(tmp_path / "p", [(1, 0), (2, 0)])
    assert "the other a bare pair" in refusal(cats, pair)
    assert "end in different tokens: id 0 and id 9" in refusal(pair, write_pair(tmp_path / "q", [(1, 9), (2, 9)]))
    with pytest.raises(UserError, match="has 1 documents, too few to split"):
        split_tokens(write_pair(tmp_path / "one", [(1, 0)]), 0.5, tmp_path / "out")


def test_an_output_in_use_is_left_alone_until_it_may_be_replaced(parts: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    split_tokens(parts["cats"], 0.1, out)
    with pytest.raises(UserError, match="out exists"):
        split_tokens(parts["cats"], 0.2, out)
    assert len(documents_of(split_tokens(parts["cats"], 0.2, out, overwrite=True).held_out)) == 6
    with pytest.raises(UserError, match="is what is read"):
        split_tokens(out, 0.2, out, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not a folder of tokens"):
        split_tokens(parts["cats"], 0.2, tmp_path / "mine", overwrite=True)


def test_nothing_is_left_where_copying_fails(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    appended = 0
    append = TokenShardWriter.append

    def append_until_full(self: TokenShardWriter, ids: np.ndarray) -> None:
        nonlocal appended
        appended += 1
        if appended == 20:
            raise OSError(28, "No space left on device")
        append(self, ids)

    monkeypatch.setattr(TokenShardWriter, "append", append_until_full)
    with pytest.raises(UserError, match="cannot be written: no space left"):
        merge_tokens(list(parts.values()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_opened_tokens_say_what_they_are(parts: dict[str, Path]) -> None:
    tokens: Tokens = open_tokens(parts["dogs"])
    assert tokens.train.num_opening == 1
