"""Where text comes from and how it is cleaned, as a user types it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
PRETRAIN = Path(__file__).resolve().parents[3] / "shared" / "data" / "pretrain"


@pytest.fixture
def tokenizer(tiny_shards: Path, tmp_path: Path) -> Path:
    (tmp_path / "tok.json").write_bytes((tiny_shards / "tokenizer.json").read_bytes())
    return tmp_path / "tok.json"


def manifest(folder: Path) -> dict[str, object]:
    read: dict[str, object] = json.loads((folder / "manifest.json").read_bytes())
    return read


def test_standard_input_patterns_and_templates(tokenizer: Path, tmp_path: Path, run_mambatrain: Run) -> None:
    lines = "".join(json.dumps({"title": f"T{n}", "body": f"text {n}"}) + "\n" for n in range(20))
    (tmp_path / "part-1.jsonl").write_text(lines, encoding="utf-8")
    options = ("--tokenizer", "tok.json", "--template", r"{title}\n\n{body}")
    piped = run_mambatrain("tokenize", "-", "--out", "piped", *options, stdin=lines)
    assert (piped.returncode, piped.stderr) == (0, "")
    matched = run_mambatrain("tokenize", "part-*.jsonl", "--out", "matched", *options)
    assert matched.returncode == 0, matched.stderr
    assert (tmp_path / "piped" / "train.bin").read_bytes() == (tmp_path / "matched" / "train.bin").read_bytes()
    assert "bytes of text    220" in piped.stdout  # 10 x (2 + 2 + 6) + 10 x (3 + 2 + 7)
    sources = manifest(tmp_path / "piped")["sources"]
    assert isinstance(sources, list)
    assert (sources[0]["file"], sources[0]["kind"]) == ("-", "json lines")
    again = run_mambatrain("tokenize", "-", "--out", "piped", *options, stdin=lines)
    assert "it is used as it is" in again.stdout
    other = run_mambatrain("tokenize", "-", "--out", "piped", *options, stdin=lines + lines)
    assert (other.returncode, "- has changed" in other.stderr) == (1, True)
    text = run_mambatrain("tokenize", "-", "--stdin", "txt", "--out", "text", "--tokenizer", "tok.json", stdin=lines)
    assert "documents        1 (0 held out)" in text.stdout
    bad = run_mambatrain("tokenize", "-", "--tokenizer", "tok.json", "--out", "bad", stdin='{"text": "x"}\nno\n')
    assert bad.stderr.startswith("error: -:2 is not JSON")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "bad"))]


def test_a_data_set_of_the_hub_is_a_source(tokenizer: Path, tmp_path: Path, run_mambatrain: Run) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    contents = []
    for name, options in (("whole", ()), ("rows", ("--streaming",))):
        arguments = ("tokenize", "hf://./set#train", "--tokenizer", "tok.json", "--out", name, *options)
        done = run_mambatrain(*arguments, environment=environment)
        assert done.returncode == 0, done.stderr
        assert "documents        2 (1 held out)" in done.stdout
        contents.append((tmp_path / name / "train.bin").read_bytes())
        assert "it is used as it is" in run_mambatrain(*arguments, environment=environment).stdout
    assert contents[0] == contents[1]
    missing = run_mambatrain("tokenize", "hf://./sat", "--tokenizer", "tok.json", "--out", "o", environment=environment)
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: hf://./sat cannot be read: ")
    assert "Traceback" not in missing.stderr


def test_cleaning_is_counted(tokenizer: Path, tmp_path: Path, run_mambatrain: Run) -> None:
    run = "one two three four five six seven eight nine ten eleven twelve thirteen"
    texts = ["e\u0301 composed", "x", "long " * 300, "same text here", "same text here", f"so: {run}!", "nul \0 kept"]
    texts += [" ".join(f"w{n}" for n in range(100)), " ".join(f"w{n}" for n in range(1, 101)), "with\r\nends"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    (tmp_path / "exam.jsonl").write_text(json.dumps({"q": {"text": run}}) + "\n", encoding="utf-8")
    options = "--normalize NFC --min-characters 2 --max-characters 1000 --deduplicate --near-duplicates 0.8"
    arguments = ("tokenize", "a.jsonl", "--tokenizer", "tok.json", "--out", "o", *options.split())
    done = run_mambatrain(*arguments, "--decontaminate", "exam.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:7] == [
        "documents        5 (1 held out)",
        "skipped          0 empty, 0 that cannot be read",
        "left out         1 shorter than --min-characters",
        "left out         1 longer than --max-characters",
        "left out         1 that share text with --decontaminate files",
        "left out         1 with the text of another",
        "left out         1 nearly the same as another",
    ]
    assert done.stderr.splitlines() == [
        "note: 1 documents hold NUL characters, which were kept",
        "note: 1 documents hold CRLF line ends, which were kept",
        "note: 1 documents were changed by --normalize",
    ]
    again = run_mambatrain(*arguments, "--decontaminate", "exam.jsonl")
    assert again.stdout.startswith("o was already made")
    other = run_mambatrain(*arguments)
    assert "  decontaminate sources: exam.jsonl is no longer among them" in other.stderr
    other = run_mambatrain(*arguments[:-1], "0.9", "--decontaminate", "exam.jsonl")
    assert "  near_duplicates: 0.8 -> 0.9" in other.stderr


@pytest.mark.skipif(not PRETRAIN.is_dir(), reason="the texts of ../shared/data are not here")
def test_the_443_duplicates_of_a_real_corpus_are_found(tokenizer: Path, tmp_path: Path, run_mambatrain: Run) -> None:
    source = PRETRAIN / "tldr_multilingual.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) - len(set(texts)) == 443
    done = run_mambatrain("tokenize", source, "--tokenizer", "tok.json", "--out", "o", "--deduplicate")
    assert done.returncode == 0, done.stderr
    found = manifest(tmp_path / "o")
    assert found["num_duplicates"] == 443
    assert f"documents        {len(set(texts)):,} (" in done.stdout


def test_tokens_do_not_depend_on_the_number_of_workers(tokenizer: Path, tmp_path: Path, run_mambatrain: Run) -> None:
    with (tmp_path / "a.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(3000):
            lines.write(json.dumps({"text": f"document {number} " * (number % 50)}) + "\n")
    for workers in ("1", "2", "4"):
        done = run_mambatrain("tokenize", "a.jsonl", "--tokenizer", "tok.json", "--out", workers, "--workers", workers)
        assert done.returncode == 0, done.stderr
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("1", "2", "4")]
    assert contents[0] == contents[1] == contents[2]


def test_two_processes_on_one_output(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {n}\n" for n in range(100_000)), encoding="utf-8")
    command = [
        Path(sys.executable).with_name("mambatrain"),
        "tokenize",
        "a.txt",
        "--tokenizer",
        "tok.json",
        "--out",
        "o",
    ]
    processes = [
        subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        )
        for _ in range(2)
    ]
    ended = sorted((*process.communicate(timeout=200), process.returncode) for process in processes)
    told = [code for *_, code in ended]
    if told == [0, 0]:  # one after the other, on a busy machine
        assert any("it is used as it is" in stdout for stdout, *_ in ended)
    else:
        assert told == [1, 0]
        assert ended[0][1].startswith("error: o is being written by another process")
    assert len(list((tmp_path / "o").iterdir())) == 8


def test_a_tokenizer_is_trained_as_llamas_and_shows_its_pieces(tmp_path: Path, run_mambatrain: Run) -> None:
    (tmp_path / "a.txt").write_text("it's 12345 times the same cat. " * 300, encoding="utf-8")
    options = ("--pretokenizer", "llama-bpe", "--special-token", "<|user|>", "--special-token", "<|model|>")
    done = run_mambatrain("tokenizer", "train", "a.txt", "--vocab-size", "290", "--out", "t.json", *options)
    assert done.returncode == 0, done.stderr
    added = json.loads((tmp_path / "t.json").read_bytes())["added_tokens"]
    names = ["<|endoftext|>", "<|user|>", "<|model|>"]
    assert [(token["id"], token["content"], token["special"]) for token in added] == [
        (number, name, True) for number, name in enumerate(names)
    ]
    shown = run_mambatrain("tokenizer", "inspect", "t.json", "the cat's 12345<|user|>é")
    assert shown.returncode == 0, shown.stderr
    pieces = [line.split(maxsplit=1)[1] for line in shown.stdout.splitlines()]
    values = [eval(piece) for piece in pieces]
    joined = b"".join(value if isinstance(value, bytes) else value.encode() for value in values)
    assert joined.decode() == "the cat's 12345<|user|>é"
    assert not [value for value in values if str(value).isdigit() and len(value) > 3]
    assert "pre-tokenizer    llama-bpe" in shown.stderr
    twice = run_mambatrain("tokenizer", "train", "a.txt", "--vocab-size", "290", "--out", "u.json", *options[2:4] * 2)
    assert "--special-token '<|user|>' is named twice" in twice.stderr
    piped = run_mambatrain("tokenizer", "inspect", "t.json", "-", stdin="cat")
    assert piped.stdout == run_mambatrain("tokenizer", "inspect", "t.json", "cat").stdout
