from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mambatrain.data.staging import StagedFolder
from mambatrain.errors import UserError


def make(out: Path, name: str) -> None:
    with StagedFolder(out) as staged:
        (staged.path / name).touch()
        staged.publish()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_folder_appears_whole_replaces_another_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "deep" / "out") as staged:
        (staged.path / "one").touch()
        assert not (tmp_path / "deep" / "out").exists()
        staged.publish()
    assert names(tmp_path / "deep" / "out") == ["one"]
    make(tmp_path / "deep" / "out", "two")
    assert names(tmp_path / "deep" / "out") == ["two"]
    assert names(tmp_path / "deep") == ["out"]


def test_what_is_not_published_is_removed_and_the_old_folder_stays(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with StagedFolder(tmp_path / "out") as staged:
        (staged.path / "folder").mkdir()
        (staged.path / "folder" / "new").touch()
    with pytest.raises(KeyboardInterrupt), StagedFolder(tmp_path / "out") as staged:
        (staged.path / "new").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_killed_between_the_two_renames_the_old_folder_comes_back(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    (tmp_path / ".out.lock").touch()
    (tmp_path / ".out.partial").mkdir()
    with StagedFolder(tmp_path / "out"):
        assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path) == ["out"]


def test_killed_before_the_old_folder_was_removed_it_goes_with_the_next(tmp_path: Path) -> None:
    make(tmp_path / "out", "new")
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "old").touch()
    make(tmp_path / "out", "newer")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["newer"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        StagedFolder(tmp_path / "out") as staged,
        pytest.raises(UserError, match="out is being written by another process"),
        StagedFolder(tmp_path / "out"),
    ):
        pass
    assert not staged.path.exists()
    with StagedFolder(tmp_path / "other"), StagedFolder(tmp_path / "out"):
        pass


MAKE_MANY = """
import sys
from mambatrain.data.staging import StagedFolder
from mambatrain.errors import UserError
out, name = sys.argv[1:]
made = 0
while made < 30:
    try:
        with StagedFolder(out) as staged:
            for number in range(5):
                (staged.path / f"{name}{number}").touch()
            staged.publish()
            made += 1
    except UserError:
        continue
"""


def test_processes_that_race_for_a_folder_never_mix_their_files(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", MAKE_MANY, tmp_path / "out"]
    processes = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") in ([f"a{number}" for number in range(5)], [f"b{number}" for number in range(5)])


def test_a_lock_on_a_removed_file_keeps_nobody_away(tmp_path: Path) -> None:
    """A process that opened the lock file before it was removed holds the lock of a file that is gone."""
    with StagedFolder(tmp_path / "out") as staged:
        late = os.open(tmp_path / ".out.lock", os.O_RDWR)
        staged.publish()
    fcntl.flock(late, fcntl.LOCK_EX | fcntl.LOCK_NB)
    make(tmp_path / "out", "next")
    os.close(late)
    assert names(tmp_path / "out") == ["next"]
