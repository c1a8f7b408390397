from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from mambatrain.data import train_tokenizer as module
from mambatrain.data.manifest import TokenizerSettings
from mambatrain.data.pretokenizers import cut_of, cut_text
from mambatrain.data.staging import only_writer_of
from mambatrain.data.tokenizer import load_tokenizer
from mambatrain.data.train_tokenizer import TrainedTokenizer, train_tokenizer
from mambatrain.errors import UserError

TEXTS = [f"The story of number {number}: it's {number * 7} steps — naïve, isn't it?\n" * 5 for number in range(200)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "corpus.jsonl", TEXTS)


def write_source(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def train(source: Path, out: Path, overwrite: bool = False, **settings: Any) -> TrainedTokenizer:
    filled = {"vocab_size": 300, "sample_bytes": 10**8, **settings}
    return train_tokenizer([source], out, TokenizerSettings(**filled), overwrite)


def test_the_tokenizer_is_gpt2s_kind_and_reversible(source: Path, tmp_path: Path) -> None:
    done = train(source, tmp_path / "new" / "tokenizer.json")
    parts = json.loads(done.file.read_bytes())
    assert parts["model"]["type"] == "BPE"
    assert parts["pre_tokenizer"]["type"] == "ByteLevel"
    assert parts["pre_tokenizer"]["use_regex"] is True
    assert parts["pre_tokenizer"]["add_prefix_space"] is False
    assert parts["normalizer"] is None
    assert parts["added_tokens"][0]["content"] == "<|endoftext|>"
    assert parts["added_tokens"][0]["special"] is True
    loaded = load_tokenizer(done.file)
    assert (loaded.vocab_size, loaded.end_of_document_id, loaded.cuts_at_newlines) == (300, 0, True)
    every_byte = bytes(range(128)).decode() + "".join(chr(code) for code in range(0x80, 0x3000, 7)) + "漢😀\U0010ffff"
    assert loaded.decode(loaded.encode_batch([every_byte])[0].tolist()) == every_byte


def test_a_second_process_does_not_write_the_same_file(source: Path, tmp_path: Path) -> None:
    with only_writer_of(tmp_path / "t.json"), pytest.raises(UserError, match=r"t\.json is being written by another"):
        train(source, tmp_path / "t.json")
    assert train(source, tmp_path / "t.json").manifest.vocab_size == 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "t.json", "t.json.manifest.json"]
    with only_writer_of(tmp_path / "t.json"):
        assert train(source, tmp_path / "t.json").reused  # nothing is written


def test_the_same_text_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(source, tmp_path / f"{name}.json", sample_bytes=20_000)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.json.manifest.json").read_bytes() == (tmp_path / "b.json.manifest.json").read_bytes()


def test_bytes_per_token_are_those_of_documents_that_were_held_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[str] = []
    original = module._train

    def spy(texts: list[str], settings: TokenizerSettings) -> Tokenizer:
        trained_on.extend(texts)
        return original(texts, settings)

    monkeypatch.setattr(module, "_train", spy)
    manifest = train(source, tmp_path / "t.json").manifest
    held_out = [text for text in TEXTS if text not in trained_on]
    assert (len(trained_on), len(held_out), manifest.held_out) == (196, 4, True)
    tokenizer = Tokenizer.from_file(str(tmp_path / "t.json"))
    num_tokens = sum(len(tokenizer.encode(text).ids) for text in held_out)
    assert manifest.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in held_out) / num_tokens)
    assert manifest.num_sampled_bytes == sum(len(text.encode()) for text in trained_on)


def test_the_sample_is_bounded_and_drawn_over_the_whole_corpus(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(module, "_train", lambda texts, size: drawn.extend(texts) or _any_tokenizer())
    train(source, tmp_path / "t.json", sample_bytes=15_000)
    places = [TEXTS.index(text) for text in drawn]
    assert 13_000 < sum(len(text.encode()) for text in drawn) <= 15_000
    for quarter in range(4):
        assert 3 <= sum(50 * quarter <= place < 50 * (quarter + 1) for place in places) <= 25


def _any_tokenizer() -> Tokenizer:
    from tokenizers import models

    return Tokenizer(models.WordLevel({"<|endoftext|>": 0, "x": 1}, unk_token="x"))


def test_a_long_document_is_drawn_in_passages(tmp_path: Path) -> None:
    text = "".join(TEXTS) * 4
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    passages = [len(passage.encode()) for passage in cut_text(text, module.PASSAGE_CHARACTERS, cut_of("gpt-2"))]
    assert len(passages) == 4
    manifest = train(tmp_path / "long.txt", tmp_path / "t.json", sample_bytes=140_000).manifest
    assert manifest.held_out
    assert manifest.num_sampled_bytes in passages  # two were drawn, one of them is held out


def test_a_single_document_is_measured_on_itself_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("all there is", encoding="utf-8")
    manifest = train(tmp_path / "one.txt", tmp_path / "t.json", sample_bytes=1).manifest
    assert not manifest.held_out
    assert manifest.num_sampled_bytes == 12
    assert 257 <= manifest.vocab_size < 300  # the text gives no more


def test_a_trained_tokenizer_is_used_again_and_what_differs_is_told(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    assert not train(source, out).reused
    before = out.read_bytes()
    assert train(source, out).reused
    for settings, told in (
        ({"vocab_size": 301}, "vocab_size: 300 -> 301"),
        ({"sample_bytes": 5000, "skip_bad": True}, "sample_bytes: 100000000 -> 5000\n  skip_bad: false -> true"),
    ):
        with pytest.raises(UserError, match="exists and was made otherwise") as caught:
            train(source, out, **settings)
        assert told in caught.value.message
        assert caught.value.hint is not None
        assert "--overwrite" in caught.value.hint
    write_source(source, TEXTS[1:])
    with pytest.raises(UserError, match=r"corpus\.jsonl has changed"):
        train(source, out)
    assert out.read_bytes() == before
    assert not train(source, out, vocab_size=290, overwrite=True).reused
    assert out.read_bytes() != before


def test_a_tokenizer_of_unknown_or_changed_making_is_not_touched(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    train(source, out)
    out.write_bytes(out.read_bytes() + b"\n")
    with pytest.raises(UserError, match="was changed since it was trained"):
        train(source, out)
    record = tmp_path / "t.json.manifest.json"
    record.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is not a manifest that can be read"):
        train(source, out)
    record.unlink()
    with pytest.raises(UserError, match=r"has no record of how it was made \(t\.json\.manifest\.json\)"):
        train(source, out)
    train(source, out, overwrite=True)
    assert train(source, out).reused


def test_what_cannot_be_trained_is_told(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--vocab-size 256 is below 257"):
        train(source, tmp_path / "t.json", vocab_size=256)
    with pytest.raises(UserError, match="is a folder") as caught:
        train(source, tmp_path)
    assert caught.value.hint == f"name a file, for example --out {tmp_path / 'tokenizer.json'}"
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"the sources hold no text \(files: 1\)"):
        train(tmp_path / "empty.txt", tmp_path / "t.json")
    with pytest.raises(UserError, match=r"t\.json cannot be written: file exists \(.*corpus\.jsonl\)"):
        train(source, source / "t.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus.jsonl", "empty.txt"]
