import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mambatrain.errors import UserError
from mambatrain.runs.folder import RunFolder, RunLog, cut_log, read_log

HOLD_LOCK = """
import sys, time
from pathlib import Path
from mambatrain.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_by_another_process_is_refused_until_that_process_dies(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"pid {other.pid}"), RunFolder(tmp_path).locked():
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with RunFolder(tmp_path).locked():
        pass


def test_a_log_is_cut_to_the_lines_of_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    log = RunLog(file)
    for step in range(5):
        log.write({"event": "step", "step": step})
    log.close()
    with file.open("a") as half:
        half.write('{"event": "step", "step": 5, "lo')
    assert [line["step"] for line in read_log(file)] == [0, 1, 2, 3, 4]
    cut_log(file, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2]


def test_a_log_shorter_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text("{}\n")
    with pytest.raises(UserError, match="has 1 lines where the checkpoint counts 3"):
        cut_log(file, 3)


def test_a_full_disk_does_not_keep_a_folder_from_being_held(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with RunFolder(tmp_path / "run").locked():
            assert RunFolder(tmp_path / "run").is_running()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
