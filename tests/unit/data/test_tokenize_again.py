"""Tokenizing where something is already, or goes wrong on the way: the folder is whole, or as it was."""

from __future__ import annotations

import fcntl
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mambatrain.data import shuffle_documents, token_spool
from mambatrain.data import tokenize_corpus as module
from mambatrain.data.combine_tokens import split_tokens
from mambatrain.data.manifest import TokenizeOptions
from mambatrain.data.token_corpus import DATA_FILES, open_token_corpus
from mambatrain.data.token_shards import TokenShardWriter
from mambatrain.data.token_spool import TokenSpool
from mambatrain.data.tokenize_corpus import HowToRead, tokenize_corpus
from mambatrain.errors import UserError

TEXTS = [f"document {number} says {'several ' * (number % 7)}\n lines" for number in range(60)]


def write_source(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "corpus.jsonl", TEXTS)


def snapshot(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_what_was_done_is_used_again_and_what_differs_is_told(
    source: Path, byte_tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def run(sources: list[Path] = [source], tokenizer: Path = byte_tokenizer, **options: Any) -> Any:  # noqa: B006
        overwrite = options.pop("overwrite", False)
        end = options.pop("end_of_document", None)
        return tokenize_corpus(sources, tokenizer, out, TokenizeOptions(**options), end, overwrite)

    run()
    before = snapshot(out)
    again = run()
    assert again.reused
    assert again.corpus.manifest.train.num_documents == 59
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_bytes(source.read_bytes())
    assert run([renamed]).reused  # the same text under another name

    other = write_source(tmp_path / "other.jsonl", ["more"])
    loud = tmp_path / "loud.json"
    loud.write_bytes(byte_tokenizer.read_bytes() + b"\n")
    for arguments, told in (
        ({"seed": 1}, "  seed: 0 -> 1"),
        ({"held_out": 0.1, "skip_bad": True}, "  held_out: 0.01 -> 0.1\n  skip_bad: false -> true"),
        ({"sources": [source, other]}, f"  sources: {other} was not among them"),
        ({"sources": [other]}, f"  sources: {source} is no longer among them"),
        ({"tokenizer": loud}, "  tokenizer sha256: "),
        ({"end_of_document": "!"}, "  tokenizer end_of_document: <|endoftext|> -> !"),
    ):
        with pytest.raises(UserError, match="exists and was made otherwise") as caught:
            run(**arguments)
        assert told in caught.value.message
        assert caught.value.hint is not None
        assert "--overwrite" in caught.value.hint
    write_source(source, [*TEXTS, "one more"])
    with pytest.raises(UserError, match=r"corpus\.jsonl has changed"):
        run()
    assert snapshot(out) == before
    assert run(overwrite=True).corpus.manifest.train.num_documents == 60
    assert snapshot(out) != before
    assert not list(tmp_path.glob(".*"))


def test_only_a_folder_of_tokens_is_ever_replaced(source: Path, byte_tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    tokenize_corpus([source], byte_tokenizer, out, TokenizeOptions())  # an empty folder may be filled
    (out / "notes.md").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for place in (out, tmp_path, tmp_path / "file"):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="exists and is not a folder of tokens"):
                tokenize_corpus([source], byte_tokenizer, place, TokenizeOptions(seed=9), overwrite=overwrite)
    assert (out / "notes.md").read_text() == (tmp_path / "file").read_text() == "mine"
    open_token_corpus(out)


def test_a_damaged_folder_is_named_and_may_be_made_anew(source: Path, byte_tokenizer: Path, tmp_path: Path) -> None:
    tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions())
    whole = snapshot(tmp_path / "out")
    shard = tmp_path / "out" / "train.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train\.bin has .* bytes where the manifest says") as caught:
        tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions())
    assert caught.value.hint == "--overwrite makes the folder anew"
    tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions(), overwrite=True)
    assert snapshot(tmp_path / "out") == whole


def test_a_link_is_kept_and_its_folder_replaced(source: Path, byte_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "tokens")
    tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions())
    tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions(seed=1), overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert open_token_corpus(tmp_path / "disk" / "tokens").manifest.options.seed == 1


def interrupt_after(num_batches: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the spool raise behind some batches, each of which is in its journal; counts those that were added."""
    added: list[int] = []
    add = TokenSpool.add

    def add_then_stop(self: TokenSpool, batch: Any) -> None:
        if len(added) == num_batches:
            raise error
        add(self, batch)
        added.append(len(batch.documents))

    monkeypatch.setattr(token_spool, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(TokenSpool, "add", add_then_stop)
    return added


@pytest.mark.parametrize("num_batches", [9, 30, 31, 32, 33, 60])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_what_was_interrupted_is_continued_and_the_bytes_are_the_same(
    source: Path,
    byte_tokenizer: Path,
    tmp_path: Path,
    num_batches: int,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A document fills several batches, so that some interruptions fall into its middle."""
    tokenize_corpus([source], byte_tokenizer, tmp_path / "whole", TokenizeOptions())
    how = HowToRead(num_workers=2, batch_characters=20)
    monkeypatch.setattr("mambatrain.data.tokenizer.PIECE_CHARACTERS", 8)
    with monkeypatch.context() as patch:
        first = interrupt_after(num_batches, error, patch)
        with pytest.raises(type(error)):
            tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions(), how=how)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".out.work", "corpus.jsonl", "whole"]
    num_entered = json.loads((tmp_path / ".out.work" / "journal.json").read_bytes())["num_documents"]
    assert sum(first) - 1 <= num_entered <= sum(first)
    for file in (tmp_path / ".out.work").iterdir():  # what was written behind the last entry does not count
        if file.name != "journal.json":
            file.write_bytes(file.read_bytes() + b"more than the journal tells of")
    with monkeypatch.context() as patch:
        second = interrupt_after(10**9, error, patch)
        tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions(), how=how)
    assert num_entered + sum(second) == len(TEXTS)
    assert num_entered > 2
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus.jsonl", "out", "whole"]


@pytest.mark.parametrize("change", ["options", "sources", "tokenizer", "journal", "tokens"])
def test_what_was_begun_from_something_else_is_not_continued(
    source: Path, byte_tokenizer: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = HowToRead(batch_characters=100)
    with monkeypatch.context() as patch:
        interrupt_after(7, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions(), how=how)
    options, tokenizer = TokenizeOptions(seed=1 if change == "options" else 0), byte_tokenizer
    if change == "sources":
        write_source(source, [*TEXTS[1:], "more"])
    elif change == "tokenizer":
        tokenizer = tmp_path / "loud.json"
        tokenizer.write_bytes(byte_tokenizer.read_bytes() + b"\n")
    elif change == "journal":
        (tmp_path / ".out.work" / "journal.json").write_text("{", encoding="utf-8")
    elif change == "tokens":
        (tmp_path / ".out.work" / "tokens").write_bytes(b"x")
    with monkeypatch.context() as patch:
        added = interrupt_after(10**9, KeyboardInterrupt(), patch)
        done = tokenize_corpus([source], tokenizer, tmp_path / "out", options, how=how)
    assert sum(added) == len(TEXTS)
    tokenize_corpus([source], tokenizer, tmp_path / "whole", options)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert not done.reused


def test_a_mistake_of_the_user_leaves_nothing_to_continue(byte_tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_text('{"text": "fine"}\n' * 500 + "no\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"corpus\.jsonl:501 is not JSON"):
        how = HowToRead(batch_characters=10)
        tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions(), how=how)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus.jsonl"]


def test_what_a_killed_process_left_is_cleared_away(source: Path, byte_tokenizer: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    (partial / "folder").mkdir(parents=True)
    (tmp_path / ".out.lock").touch()
    (partial / "train.bin").write_bytes(b"half")
    tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions())
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*DATA_FILES, "manifest.json"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus.jsonl", "out"]


def test_a_folder_that_another_process_writes_is_refused(source: Path, byte_tokenizer: Path, tmp_path: Path) -> None:
    with (tmp_path / ".out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="out is being written by another process"):
            tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions())
        assert not (tmp_path / ".out.work").exists()
        assert (tmp_path / ".out.lock").exists()
        assert not (tmp_path / ".out.partial").exists()
    tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions())


def test_a_full_disk_is_told_and_nothing_is_left(
    source: Path, byte_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full.bin").symlink_to("/dev/full")
    monkeypatch.setattr(
        shuffle_documents, "TokenShardWriter", lambda prefix, dtype: TokenShardWriter(tmp_path / "full", dtype)
    )
    with pytest.raises(UserError, match="out cannot be written: no space left on device") as caught:
        tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions())
    assert caught.value.hint == "nothing was kept of it; make room and run again"
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_a_place_that_cannot_be_written_is_named(source: Path, byte_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out cannot be written: file exists \(.*corpus\.jsonl\)"):
        tokenize_corpus([source], byte_tokenizer, source / "out", TokenizeOptions())


def test_a_source_that_grows_under_way_is_refused(
    source: Path, byte_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = module.record_sources

    def digest_then_append(files: Any) -> Any:
        records = digest(files)
        with source.open("a") as file:
            file.write('{"text": "late"}\n')
        return records

    monkeypatch.setattr(module, "record_sources", digest_then_append)
    with pytest.raises(UserError, match=r"corpus\.jsonl was changed while it was being read"):
        tokenize_corpus([source], byte_tokenizer, tmp_path / "out", TokenizeOptions())
    assert not (tmp_path / "out").exists()


def test_what_merge_or_split_made_is_not_taken_for_what_tokenize_makes(
    source: Path, byte_tokenizer: Path, tmp_path: Path
) -> None:
    """Its manifest has the sources, the tokenizer and the options of its parts, but its documents lie otherwise."""
    tokenize_corpus([source], byte_tokenizer, tmp_path / "a", TokenizeOptions())
    out = tmp_path / "out"
    split_tokens(tmp_path / "a", 0.01, out)
    before = snapshot(out)
    with pytest.raises(UserError, match="out exists and was made otherwise:\n  by `data split`, from ") as caught:
        tokenize_corpus([source], byte_tokenizer, out, TokenizeOptions())
    assert str(tmp_path / "a") in caught.value.message
    assert snapshot(out) == before
    assert not tokenize_corpus([source], byte_tokenizer, out, TokenizeOptions(), overwrite=True).reused
    assert snapshot(out) == snapshot(tmp_path / "a")
