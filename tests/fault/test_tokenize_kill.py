"""`tokenize` killed at twenty moments and started again gives the bytes of a life that was never killed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

KILLS = 20


def write_source(file: Path) -> Path:
    """1,500 documents: repeated, empty, unreadable, uncomposed ones, and some of many batches."""
    words = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for number in range(1500):
            text = f"e\u0301 {number} " + "the cat and the dog " * words.randrange(40)
            text = "seen before" if number % 50 == 0 else " " if number % 70 == 1 else text
            text *= 100 if number % 400 == 399 else 1
            lines.write("not json\n" if number % 90 == 2 else json.dumps({"text": text}) + "\n")
    return file


def lives(source: Path, tokenizer: Path, out: Path, kills: int) -> list[dict[str, Any]]:
    command = [
        sys.executable,
        "-P",
        Path(__file__).with_name("tokenize_lives.py"),
        source,
        tokenizer,
        out,
        "1",
        str(kills),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: list[dict[str, Any]] = json.loads(done.stdout)
    return told


def test_killed_at_any_moment_and_started_again_the_bytes_are_the_same(tiny_shards: Path, tmp_path: Path) -> None:
    source, tokenizer = write_source(tmp_path / "corpus.jsonl"), tiny_shards / "tokenizer.json"
    lives(source, tokenizer, tmp_path / "whole", 0)
    told = lives(source, tokenizer, tmp_path / "out", KILLS)
    assert [life["killed"] for life in told] == [True] * KILLS + [False]
    assert told[-1]["status"] == 0
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "out")]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "out", "whole"]
    # The kills fell where they prove something: in the middle of encoding, and in the middle of writing the shards.
    documents = [life["documents"] for life in told[:-1]]
    assert sum(0 < count < 1400 for count in documents) >= 3
    assert sum(later > before > 0 for before, later in pairwise(documents)) >= 3
    assert sum(".out.partial" in life["names"] for life in told[:-1]) >= 3
    manifest = json.loads(contents[1]["manifest.json"])
    assert (manifest["num_duplicates"], manifest["num_skipped_bad"]) == (29, 17)
    assert manifest["num_normalized"] > 1300
