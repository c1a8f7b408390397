"""Standard input and data sets become files. No network: a data set is a local folder that `load_dataset` reads."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mambatrain.data.documents import DocumentReader
from mambatrain.data.sources import find_sources
from mambatrain.data.streams import HubSource, keep_streams, parse_hub_source
from mambatrain.data.text_fields import TextFields
from mambatrain.errors import UserError


@pytest.mark.parametrize(
    ("text", "name", "config", "revision", "split"),
    [
        ("hf://a/b", "a/b", None, None, "train"),
        ("hf://a/b:cfg", "a/b", "cfg", None, "train"),
        ("hf://a/b@v1.0", "a/b", None, "v1.0", "train"),
        ("hf://a/b:c.d-e@refs/convert/parquet#test", "a/b", "c.d-e", "refs/convert/parquet", "test"),
        ("hf://wikitext#validation", "wikitext", None, None, "validation"),
        ("hf:///a/folder#train", "/a/folder", None, None, "train"),
    ],
)
def test_a_data_set_is_spelled_by_name_config_revision_and_split(
    text: str, name: str, config: str | None, revision: str | None, split: str
) -> None:
    assert parse_hub_source(text) == HubSource(name, config, revision, split, text)


@pytest.mark.parametrize("text", ["hf://", "hf://#train", "hf://a/b:", "hf://a/b@"])
def test_what_is_not_spelled_so_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not the name of a data set"):
        parse_hub_source(text)


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two configurations; what `load_dataset` makes of it lies beside it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "stories"
    for config, split, count in (("short", "train", 700), ("short", "test", 2), ("long", "train", 1)):
        rows = [{"title": f"{config} {split}", "text": f"story {n} é", "n": n} for n in range(count)]
        (folder / config).mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / config / f"{split}.jsonl").write_text(content, encoding="utf-8")
    files = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}.jsonl\n" for split in splits)
        for config, splits in (("short", ("train", "test")), ("long", ("train",)))
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_gives_its_rows(data_set: Path, tmp_path: Path, streaming: bool) -> None:
    work = tmp_path / "work"
    work.mkdir()
    fields = TextFields(template="{title}: {text}")

    def texts(spelled: str) -> tuple[list[str], str]:
        found = find_sources(keep_streams([spelled], work, fields, streaming=streaming))
        documents = list(DocumentReader(found.files, fields))
        return [document.text for document in documents], documents[0].origin

    train, origin = texts(f"hf://{data_set}:short")
    assert train == [f"short train: story {n} é" for n in range(700)]
    assert origin == f"hf://{data_set}:short{'' if streaming else '/0'}:1"
    assert texts(f"hf://{data_set}:short#test")[0] == ["short test: story 0 é", "short test: story 1 é"]
    assert texts(f"hf://{data_set}:long")[0] == ["long train: story 0 é"]
    assert bool(list(work.iterdir())) is streaming
    with pytest.raises(UserError, match="has no split `tset`") as caught:
        texts(f"hf://{data_set}:short#tset")
    assert caught.value.hint == "did you mean #test?"
    with pytest.raises(UserError, match="cannot be read: ") as caught:
        texts(f"hf://{data_set}:middle")
    assert "short" in caught.value.message


@pytest.mark.parametrize("streaming", [False, True])
def test_a_field_that_a_data_set_lacks_is_named(data_set: Path, tmp_path: Path, streaming: bool) -> None:
    fields = TextFields("txt")
    found = find_sources(keep_streams([f"hf://{data_set}:long"], tmp_path, fields, streaming=streaming))
    with pytest.raises(UserError, match=r"no (field|column) `txt`"):
        list(DocumentReader(found.files, fields))
    fields = TextFields("n")
    found = find_sources(keep_streams([f"hf://{data_set}:long"], tmp_path, fields, streaming=streaming))
    with pytest.raises(UserError, match="holds a number in `n`, not text"):
        list(DocumentReader(found.files, fields))


def test_a_data_set_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hf://nobody/nothing cannot be read: ") as caught:
        keep_streams(["hf://nobody/nothing"], tmp_path, TextFields())
    assert caught.value.hint is not None
    assert "hf://NAME" in caught.value.hint


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(content)))


def test_standard_input_is_a_file_in_its_place_among_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    pipe(monkeypatch, b'{"text": "second"}\n{"text": "third"}\n')
    found = find_sources(keep_streams([tmp_path / "a.txt", "-"], tmp_path, TextFields()))
    assert [document.text for document in DocumentReader(found.files)] == ["first", "second", "third"]
    assert [file.name for file in found.files] == [str(tmp_path / "a.txt"), "-"]
    pipe(monkeypatch, b'{"text": "one\n')
    found = find_sources(keep_streams(["-"], tmp_path, TextFields(), standard_input="txt"))
    assert [document.text for document in DocumentReader(found.files)] == ['{"text": "one\n']


def test_standard_input_must_be_there_and_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is named twice"):
        keep_streams(["-", "-"], tmp_path, TextFields())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, buffer=io.BytesIO()))
    with pytest.raises(UserError, match="nothing is piped into it"):
        keep_streams(["-"], tmp_path, TextFields())
