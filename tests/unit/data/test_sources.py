from __future__ import annotations

import os
from pathlib import Path

import pytest

from mambatrain.data.sources import check_unchanged, described_file, find_sources, kind_of
from mambatrain.errors import UserError


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")


def test_a_folder_is_read_in_the_order_of_its_paths_and_says_what_it_does_not_read(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "a/z.md", "a/b/c.py", "c.JSONL", "d.jsonl.gz", "e.parquet", "a.txt")
    write(tmp_path, "licence", "table.csv", ".hidden.txt", ".git/config.txt")
    found = find_sources([tmp_path])
    names = [file.path.relative_to(tmp_path).as_posix() for file in found.files]
    assert names == ["a.txt", "a/b/c.py", "a/z.md", "b.txt", "c.JSONL", "d.jsonl.gz", "e.parquet"]
    assert [path.name for path in found.unread] == ["licence", "table.csv"]
    assert found.num_bytes == sum(len(Path(name).as_posix()) for name in names)


def test_named_sources_keep_their_order(tmp_path: Path) -> None:
    write(tmp_path, "z.txt", "a.txt", "folder/m.txt")
    found = find_sources([str(tmp_path / "z.txt"), tmp_path / "folder", tmp_path / "a.txt"])
    assert [file.path.name for file in found.files] == ["z.txt", "m.txt", "a.txt"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("x.txt", "text"), ("x.md", "text"), ("x.py", "python"), ("x.cpp", "text"), ("x.jsonl", "json lines"),
     ("x.ndjson", "json lines"), ("x.json", "json"), ("x.parquet", "parquet"), ("x.arrow", "arrow"),
     ("x.jsonl.gz", "gzipped json lines"), ("x.JSONL.ZST", "zstd json lines"), ("x.txt.zst", "zstd text"),
     ("x.txt.gz", "gzipped text"), ("x.json.gz", "gzipped json"), ("x.y.txt", "text"), ("x.parquet.gz", None),
     ("x.py.gz", None), ("x.gz", None), ("x.csv", None), ("txt", None), ("x.txt.gz.zst", None)],
)  # fmt: skip
def test_the_ending_tells_the_kind(tmp_path: Path, name: str, kind: str | None) -> None:
    found = kind_of(Path(name))
    assert (None if found is None else described_file(tmp_path, *found).kind_name) == kind


def test_a_missing_file_is_named_with_its_nearest_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "corpus.jsonl", "other.txt")
    with pytest.raises(UserError) as caught:
        find_sources([tmp_path / "corpsu.jsonl"])
    assert caught.value.message == f"{tmp_path / 'corpsu.jsonl'} does not exist"
    assert caught.value.hint == f"did you mean {tmp_path / 'corpus.jsonl'}?"
    with pytest.raises(UserError) as caught:
        find_sources([tmp_path / "nowhere" / "corpus.jsonl"])
    assert caught.value.hint == f"there is no folder {tmp_path / 'nowhere'} either"


@pytest.mark.parametrize(("name", "told"), [("x.csv", ".parquet"), ("x", ".txt"), ("x.parquet.gz", ".parquet")])
def test_an_unknown_ending_is_refused(tmp_path: Path, name: str, told: str) -> None:
    write(tmp_path, name)
    with pytest.raises(UserError, match="is not known") as caught:
        find_sources([tmp_path / name])
    assert caught.value.hint is not None
    assert told in caught.value.hint


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    for names in ([tmp_path, tmp_path / "a.txt"], [tmp_path / "a.txt", tmp_path / "link.txt"]):
        with pytest.raises(UserError, match="is named twice, the first time as"):
            find_sources(names)


def test_a_folder_without_text_and_no_source_at_all_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "table.csv")
    with pytest.raises(UserError, match="holds no text to read"):
        find_sources([tmp_path])
    with pytest.raises(UserError, match="no source is named"):
        find_sources([])


def test_a_pattern_stands_for_the_files_that_fit(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "a.jsonl", "a.csv", "settings.json", "deep/er/c.jsonl", "deep/d.txt", "odd[1].txt")
    found = find_sources([str(tmp_path / "*.jsonl"), str(tmp_path / "deep" / "**" / "*.jsonl")])
    assert [file.path.name for file in found.files] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    found = find_sources([str(tmp_path / "?.*")])
    assert [file.path.name for file in found.files] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in found.unread] == ["a.csv"]
    assert [file.path.name for file in find_sources([str(tmp_path / "*.json")]).files] == ["settings.json"]
    assert [file.path.name for file in find_sources([tmp_path / "odd[1].txt"]).files] == ["odd[1].txt"]
    for pattern in ("*.md", "*.csv"):
        with pytest.raises(UserError, match="fits no file of text"):
            find_sources([str(tmp_path / pattern)])


def test_json_files_of_a_folder_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "a.jsonl.manifest.json")
    found = find_sources([tmp_path])
    assert [file.path.name for file in found.files] == ["a.jsonl"]
    assert [path.name for path in found.unread] == ["a.jsonl.manifest.json"]


def test_a_stream_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        find_sources([tmp_path / "pipe.txt"])


def test_a_file_that_changes_under_way_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b.txt")
    found = find_sources([tmp_path])
    check_unchanged(found.files)
    (tmp_path / "b.txt").write_text("longer than it was", encoding="utf-8")
    with pytest.raises(UserError, match=r"b\.txt was changed while it was being read"):
        check_unchanged(found.files)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b\.txt was changed"):
        check_unchanged(found.files)
