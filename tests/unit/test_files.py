"""Files that appear whole or not at all, and what is said when the disk does not take them."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mambatrain import files
from mambatrain.errors import UserError
from mambatrain.files import explaining_full_disk, write_bytes_whole, write_errors_named, write_json_whole

FULL = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]
LIMIT_BYTES = 10_000


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    write_bytes_whole(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        write_bytes_whole(tmp_path / "a", "text")  # type: ignore[arg-type]
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_text_is_on_the_disk_before_it_has_its_name_and_the_name_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []

    def record(descriptor: int) -> None:
        synced.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), (tmp_path / "a.json").exists()))

    monkeypatch.setattr(files.os, "fsync", record)
    write_json_whole(tmp_path / "a.json", {"key": "é"})
    assert synced == [(str(tmp_path / ".a.json.partial"), False), (str(tmp_path), True)]
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "key": "é"\n}\n'


@pytest.mark.parametrize("code", FULL)
def test_a_full_disk_is_named(tmp_path: Path, code: int) -> None:
    with pytest.raises(UserError, match="out cannot be written") as caught, write_errors_named(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert caught.value.hint == "nothing was kept of it; make room and run again"
    with pytest.raises(UserError, match="the disk is full: the log was not written"), explaining_full_disk("the log"):
        raise OSError(code, os.strerror(code))


def test_a_place_that_takes_no_files_is_named_with_a_hint() -> None:
    with (
        pytest.raises(UserError, match=r"/proc/x cannot be written: no such file or directory \(/proc/.*\)") as caught,
        write_errors_named("/proc/x"),
    ):
        write_bytes_whole(Path("/proc/x"), b"")
    assert caught.value.hint == "name a place where files can be written"


def test_other_errors_pass() -> None:
    with pytest.raises(PermissionError), explaining_full_disk("it"):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(OSError, match="a library's sentence"), write_errors_named("out"):
        raise OSError("a library's sentence")


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ("explaining_full_disk('it')", "the disk is full: it was not written"),
        ("write_errors_named('it')", "it cannot be written: file too large"),
    ],
)
def test_the_writer_of_tensors_on_a_full_disk(tmp_path: Path, context: str, message: str) -> None:
    """A limit on the size of files stands for the full disk: the same error from the same calls."""
    program = f"""
import numpy
from safetensors.numpy import save_file
from mambatrain.errors import UserError
from mambatrain.files import explaining_full_disk, write_errors_named
try:
    with {context}:
        save_file({{"x": numpy.zeros({LIMIT_BYTES}, "f4")}}, "x.safetensors")
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES)),
    )
    assert (done.stdout, done.stderr) == (f"{message}\n", "")
