"""Memory does not grow with the corpus, nor with a document of it. The long form is tests/long/tokenize_memory.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MAX_MEGABYTES = 230
# What this process itself held at most: what the system tells the parent counts the parent's own memory, too.
TOKENIZE = """
import re, sys
from pathlib import Path
from mambatrain.cli import app
app(sys.argv[1:], standalone_mode=False)
assert "torch" not in sys.modules
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1000, "MB")
"""


def peak_megabytes(folder: Path, source: Path, *options: str) -> int:
    command = [sys.executable, "-P", "-c", TOKENIZE, "tokenize", source, "--tokenizer", "tok.json", "--out", "out"]
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-2])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="/proc tells how much memory a process held")
def test_a_long_document_without_line_ends_takes_no_more_than_many_short_ones(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """Given whole, the long one takes over a gigabyte."""
    (tmp_path / "tok.json").write_bytes((tiny_shards / "tokenizer.json").read_bytes())
    (tmp_path / "long.txt").write_text("the cat, the dog and some 漢字。" * 400_000, encoding="utf-8")
    peak = peak_megabytes(tmp_path, tmp_path / "long.txt", "--workers", "2")
    assert 50 < peak < MAX_MEGABYTES
    with (tmp_path / "many.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(100_000):
            lines.write(f'{{"text": "the cat, the dog and number {number}{", and so on" * 9}"}}\n')
    (tmp_path / "out").rename(tmp_path / "long")
    assert 50 < peak_megabytes(tmp_path, tmp_path / "many.jsonl", "--workers", "2") < MAX_MEGABYTES
