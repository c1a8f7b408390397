"""Archives: what comes back is what was there, what is whole is not copied twice, nothing half is taken for whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from mambatrain.errors import UserError
from mambatrain.runs import archive
from mambatrain.runs.archive import archive_run, fetch_run
from mambatrain.runs.checkpoint import Progress, list_checkpoints, save_checkpoint
from mambatrain.runs.folder import RunFolder

OWN_FILES = ["log.jsonl", "recipe.yaml", "run.json", "tokenizer.json"]


@pytest.fixture(params=["memory", "file"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL where nothing is yet."""
    memory = fsspec.filesystem("memory")
    if memory.exists("/archive"):
        memory.rm("/archive", recursive=True)
    return "memory://archive/demo" if request.param == "memory" else f"file://{tmp_path / 'elsewhere' / 'demo'}"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "demo")
    for step in (1, 2, 3):
        progress = Progress(step=step, best_step=2)
        save_checkpoint(folder.checkpoints, progress, {"w": torch.ones(50) * step}, {"w.step": torch.ones(1)})
    for name in OWN_FILES:
        (folder.path / name).write_text(f"{name}\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def damage(url: str) -> None:
    with fsspec.open(url, "rb") as file:
        content = bytearray(file.read())
    content[len(content) // 2] ^= 1
    with fsspec.open(url, "wb") as file:
        file.write(content)


@pytest.mark.parametrize(("which", "steps"), [("newest", [3]), ("best", [2]), ("all", [1, 2, 3])])
def test_what_is_archived_comes_back(run: RunFolder, target: str, tmp_path: Path, which: Any, steps: list[int]) -> None:
    archived = archive_run(run, target, which)
    fetched = fetch_run(target, tmp_path / "back")
    here, back = contents(run.path), contents(tmp_path / "back")
    assert back == {name: here[name] for name in back}
    assert [int(folder.name[5:]) for folder in list_checkpoints(tmp_path / "back")] == steps
    assert sorted(name for name in back if "/" not in name) == OWN_FILES
    assert sorted(archived.files) == sorted(fetched.files) == sorted(back)
    assert archived.num_bytes == sum(map(len, back.values()))


def test_what_is_whole_is_not_copied_again(run: RunFolder, target: str) -> None:
    first = archive_run(run, target, "newest")
    run.log_file.write_text("log.jsonl\nand a line\n")
    again = archive_run(run, target, "all")
    assert again.num_there == len(first.files) - 1
    assert [name for name in again.files if not name.startswith("checkpoints")] == ["log.jsonl"]
    assert len(again.files) == 1 + 2 * 4
    assert archive_run(run, target, "all").files == []


def test_an_archiving_that_was_cut_short_goes_on_and_is_no_archive_before(
    run: RunFolder, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive_run(run, target, "newest")
    opened, written = archive.Storage.open, list[str]()

    def cut_short(storage: archive.Storage, name: str, mode: Any) -> Any:
        if mode == "wb" and name.startswith("checkpoints"):
            written.append(name)
            if len(written) == 3:
                raise KeyboardInterrupt
        return opened(storage, name, mode)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(archive.Storage, "open", cut_short)
        archive_run(run, target, "all")
    with pytest.raises(UserError, match="no archive") as raised:
        fetch_run(target, tmp_path / "back")
    assert "cut short" in str(raised.value.hint)
    assert archive_run(run, target, "all").num_there == 2 + 4 + len(OWN_FILES)
    fetch_run(target, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(run.path)


@pytest.mark.parametrize("torn", [archive.PARTIAL_FILE, archive.ARCHIVE_FILE])
def test_a_list_whose_writing_was_cut_short_is_written_again(
    run: RunFolder, target: str, tmp_path: Path, torn: str
) -> None:
    archive_run(run, target, "newest")
    with fsspec.open(f"{target}/{archive.ARCHIVE_FILE}", "rb") as file:
        content = file.read()
    fsspec.filesystem(target.partition(":")[0]).rm(f"{target}/{archive.ARCHIVE_FILE}")
    with fsspec.open(f"{target}/{torn}", "wb") as file:
        file.write(content[: len(content) // 2])
    with pytest.raises(UserError, match="no archive") as raised:
        fetch_run(target, tmp_path / "back")
    assert "cut short" in str(raised.value.hint)
    assert archive_run(run, target, "newest").num_there == 0
    fetch_run(target, tmp_path / "back")


def test_a_file_that_was_changed_there_is_not_fetched(run: RunFolder, target: str, tmp_path: Path) -> None:
    archive_run(run, target, "newest")
    changed = f"{target}/checkpoints/step-00000003/model.safetensors"
    damage(changed)
    with pytest.raises(UserError, match=r"model\.safetensors was changed") as raised:
        fetch_run(target, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert "remove that file, then archive the run again" in str(raised.value.hint)
    fsspec.filesystem(target.partition(":")[0]).rm(changed)
    archive_run(run, target, "newest")
    fetch_run(target, tmp_path / "back")


def test_a_damaged_newest_checkpoint_cannot_say_which_is_the_best(run: RunFolder, target: str) -> None:
    (list_checkpoints(run.path)[-1] / "progress.json").write_text('{"bad": 1}')
    with pytest.raises(UserError, match=r"progress\.json has 10 bytes"):
        archive_run(run, target, "best")


def test_an_archive_is_never_written_over_a_run(run: RunFolder, tmp_path: Path) -> None:
    """Its own folder least of all: the files it is read from would be emptied first."""
    before = contents(run.path)
    (tmp_path / "link").symlink_to(run.path)
    for target in (str(run.path), f"file://{run.path}", str(tmp_path / "link")):
        with pytest.raises(UserError, match="holds a run"):
            archive_run(run, target, "newest")
    assert contents(run.path) == before


def test_a_fetching_that_was_cut_short_goes_on(
    run: RunFolder, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive_run(run, target, "newest")
    make_durable, made = archive.make_durable, list[Path]()

    def cut_short(file: Path) -> Any:
        made.append(file)
        if len(made) == 4:
            raise KeyboardInterrupt
        return make_durable(file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(archive, "make_durable", cut_short)
        fetch_run(target, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert fetch_run(target, tmp_path / "back").num_there >= 3
    assert not list(tmp_path.glob(".back*"))


def test_what_storage_did_not_keep_is_noticed(run: RunFolder, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = archive.Storage.open

    def damaging(storage: archive.Storage, name: str, mode: Any) -> Any:
        if mode == "rb" and name.endswith("model.safetensors"):
            damage(f"{target}/{name}")
        return opened(storage, name, mode)

    monkeypatch.setattr(archive.Storage, "open", damaging)
    with pytest.raises(UserError, match="is not what was written there"):
        archive_run(run, target, "newest")


def test_what_cannot_be_archived_is_refused(run: RunFolder, target: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoints yet"):
        archive_run(RunFolder(tmp_path / "other"), target, "newest")
    archive_run(run, target, "newest")
    run.recipe_file.write_text("another")
    with pytest.raises(UserError, match="archive of another run"):
        archive_run(run, target, "newest")
    with pytest.raises(UserError, match="exists already"):
        fetch_run(target, run.path)
    damage(str(list_checkpoints(run.path)[-1] / "optimizer.safetensors"))
    with pytest.raises(UserError, match="was changed"):
        archive_run(run, f"{target}-2", "newest")


def test_an_archive_that_names_a_file_outside_is_refused(run: RunFolder, target: str, tmp_path: Path) -> None:
    archive_run(run, target, "newest")
    with fsspec.open(f"{target}/archive.json", "r") as file:
        content = json.load(file)
    content["files"]["../outside"] = {"bytes": 0, "sha256": ""}
    with fsspec.open(f"{target}/archive.json", "w") as file:
        json.dump(content, file)
    with pytest.raises(UserError, match="outside of the run"):
        fetch_run(target, tmp_path / "back")


def test_a_package_that_is_missing_is_named(run: RunFolder, tmp_path: Path) -> None:
    # None of the project's dependencies brings it.
    with pytest.raises(UserError, match="needs a package that is not installed") as raised:
        archive_run(run, "oss://bucket/demo", "newest")
    assert raised.value.hint == "pip install ossfs"
    with pytest.raises(UserError, match="cannot be reached"):
        fetch_run("nowhere://bucket/demo", tmp_path / "back")
