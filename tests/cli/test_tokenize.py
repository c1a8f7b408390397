"""`tokenize` and `tokenizer train` as a user runs them."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

Run = Callable[..., subprocess.CompletedProcess[str]]
MAMBATRAIN = Path(sys.executable).with_name("mambatrain")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """200 documents; in the folder beside them a file that is not text."""
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [json.dumps({"text": f"It's the story of number {n}, {n * n}.\n"}) + "\n" for n in range(199)]
    (folder / "stories.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "note.md").write_text("# A note\n", encoding="utf-8")
    (folder / "table.csv").write_text("1,2\n", encoding="utf-8")
    return folder


@pytest.fixture
def tokenizer(corpus: Path, tmp_path: Path, run_mambatrain: Run) -> Path:
    done = run_mambatrain("tokenizer", "train", "texts", "--vocab-size", "300", "--out", "tok.json")
    assert done.returncode == 0, done.stderr
    return tmp_path / "tok.json"


def test_text_becomes_tokens_and_a_second_time_finds_them(tokenizer: Path, tmp_path: Path, run_mambatrain: Run) -> None:
    arguments = ("tokenize", "texts", "--tokenizer", "tok.json", "--out", "tokens", "--held-out", "0.1")
    done = run_mambatrain(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "documents        200 (20 held out)"
    assert done.stdout.splitlines()[1] == "skipped          0 empty, 0 that cannot be read"
    assert done.stdout.splitlines()[-1] == "written to       tokens"
    assert done.stderr == "note: not read, because of the ending: texts/table.csv\n"

    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_bytes())
    assert str(tmp_path) not in json.dumps(manifest)  # only what was typed
    assert [record["file"] for record in manifest["sources"]] == ["texts/note.md", "texts/stories.jsonl"]
    text = "".join(f"It's the story of number {n}, {n * n}.\n" for n in range(199)) + "# A note\n"
    # Each shard opens with an end token that belongs to no document; of the rest each document has one.
    num_tokens = manifest["train"]["num_tokens"] - 1 + manifest["held_out"]["num_tokens"] - 1
    assert f"bytes of text    {len(text):,}" in done.stdout
    assert f"tokens           {num_tokens:,} (" in done.stdout
    assert f"bytes per token  {len(text) / (num_tokens - 200):.3f}" in done.stdout

    again = run_mambatrain(*arguments)
    assert again.returncode == 0
    first, _, rest = again.stdout.partition("\n")
    assert first == "tokens was already made from the same sources, tokenizer and options; it is used as it is"
    assert rest == done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts", "tok.json", "tok.json.manifest.json", "tokens"]


def test_a_tokenizer_is_trained_told_and_found_again(corpus: Path, tmp_path: Path, run_mambatrain: Run) -> None:
    arguments = ("tokenizer", "train", "texts", "--out", "tok.json", "--vocab-size")
    done = run_mambatrain(*arguments, "300")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "tokens           300"
    assert done.stdout.splitlines()[2].endswith("held out")
    assert done.stdout.splitlines()[-1] == "tokenizer        tok.json"
    assert Tokenizer.from_file(str(tmp_path / "tok.json")).token_to_id("<|endoftext|>") == 0
    again = run_mambatrain(*arguments, "300")
    assert again.stdout == (
        "tok.json was already trained on the same sources with the same settings; it is used as it is\n" + done.stdout
    )
    other = run_mambatrain(*arguments, "301")
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr.startswith("error: tok.json exists and was made otherwise:\n  vocab_size: 300 -> 301\n\nhint: ")
    large = run_mambatrain(*arguments, "9000", "--overwrite")
    assert large.returncode == 0
    assert "fewer than 9,000" in large.stderr


MISTAKES = {
    "nowhere --tokenizer tok.json --out o": ("nowhere does not exist", "name folders, or files that end in .txt"),
    "text --tokenizer tok.json --out o": ("text does not exist", "did you mean texts?"),
    "texts/table.csv --tokenizer tok.json --out o": ("texts/table.csv: what `.csv` files hold", ".parquet"),
    "texts --tokenizer tik.json --out o": ("tik.json does not exist", "did you mean tok.json?"),
    "texts --tokenizer texts --out o": ("texts holds no tokenizer.json", "tokenizer train"),
    "texts --tokenizer tok.json --out o --end-of-document <end>": ("tok.json has no token <end>", "<|endoftext|>"),
    "texts --tokenizer tok.json --out o --text-field txt": ("stories.jsonl:1 has no field `txt`", "--text-field text"),
    "texts --tokenizer tok.json --out texts": ("texts exists and is not a folder of tokens", "another --out"),
    "bad.txt --tokenizer tok.json --out o": ("bad.txt:2 is not UTF-8", "--skip-bad"),
}  # fmt: skip


def test_each_mistake_gets_a_sentence_and_a_hint(tokenizer: Path, tmp_path: Path, run_mambatrain: Run) -> None:
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, (message, hint) in MISTAKES.items():
        done = run_mambatrain("tokenize", *arguments.split())
        error, _, rest = done.stderr.partition("\n\nhint: ")
        assert (done.returncode, done.stdout) == (1, ""), arguments
        assert error.startswith("error: ")
        assert message in error, arguments
        assert hint in rest, arguments
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_bad_documents_that_are_left_out_are_named(tokenizer: Path, tmp_path: Path, run_mambatrain: Run) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + "no\n" * 25, encoding="utf-8")
    arguments = ("tokenize", "bad.jsonl", "--tokenizer", "tok.json", "--out", "o", "--skip-bad")
    done = run_mambatrain(*arguments)
    assert done.returncode == 0
    assert "skipped          0 empty, 25 that cannot be read" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("skipped: bad.jsonl:2 is not JSON")
    assert lines[-1] == "skipped: 5 more"
    again = run_mambatrain(*arguments)
    assert (again.returncode, again.stderr) == (0, "")


def test_nothing_to_train_a_tokenizer_on(run_mambatrain: Run) -> None:
    done = run_mambatrain("tokenizer", "train", "nowhere", "--vocab-size", "300", "--out", "tok.json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: nowhere does not exist\n\nhint: name folders, or files that end in .txt")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("tokenize t --tokenizer t --out o --held-out 1.5", "'--held-out': 1.5 is not a fraction from 0 to below 1"),
        ("tokenize t --tokenizer t --out o --held-out nan", "'--held-out': nan is not a fraction from 0 to below 1"),
        ("tokenize t --tokenizer t --out o --seed -1", "'--seed': -1 is not from 0 to 2^64 - 1"),
        ("tokenizer train t --out o --vocab-size 100", "'--vocab-size': "),
    ],
)
def test_a_value_out_of_range_names_its_option(run_mambatrain: Run, arguments: str, problem: str) -> None:
    done = run_mambatrain(*arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Invalid value for {problem}" in done.stderr


def test_wrong_use_ends_with_2(run_mambatrain: Run) -> None:
    for arguments in ((), ("texts",), ("texts", "--tokenizer", "t", "--out", "o", "--hold-out", "1")):
        assert run_mambatrain("tokenize", *arguments).returncode == 2


def test_a_full_disk_is_an_error_with_a_hint_and_nothing_is_left(tokenizer: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the same error from the same calls."""
    (tmp_path / "long.txt").write_text("a story of words\n" * 5000, encoding="utf-8")
    done = subprocess.run(
        [MAMBATRAIN, "tokenize", "long.txt", "--tokenizer", "tok.json", "--out", "o"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: o cannot be written: file too large")
    assert "hint: nothing was kept of it; make room and run again" in done.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".o", "o"))]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_at_any_moment_there_is_a_whole_folder_or_none(tokenizer: Path, tmp_path: Path, stop: int) -> None:
    text = "".join(f"line {n} of {n * n} and so on, it's long\n" for n in range(40_000))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    command = [MAMBATRAIN, "tokenize", "long.txt", "texts", "--tokenizer", "tok.json", "--out", "o"]
    # A suite that was started in the background ignores SIGINT, and its children would, too.
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  (no threads here)
    )
    while not (tmp_path / ".o.work" / "tokens").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(stop)
    stdout, stderr = process.communicate(timeout=60)
    assert not (tmp_path / "o").exists()
    assert (stdout, "Traceback" in stderr) == ("", False)
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert stderr.endswith("the same command continues where this one was stopped\nstopped\n")
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".o")] == [".o.work"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".o")]
    assert "documents        201 " in done.stdout


def test_tokens_do_not_depend_on_the_number_of_threads(tokenizer: Path, tmp_path: Path, run_mambatrain: Run) -> None:
    for name, threads in (("one", "1"), ("two", "2")):
        environment = {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        done = run_mambatrain("tokenize", "texts", "--tokenizer", "tok.json", "--out", name, environment=environment)
        assert done.returncode == 0
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 8
