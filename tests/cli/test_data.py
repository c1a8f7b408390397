"""`data inspect`, `check`, `merge`, `split` as a user runs them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tokens(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "tokens"))


def test_inspect_tells_draws_and_shows(tokens: Path, tmp_path: Path, run_mambatrain: Run) -> None:
    done = run_mambatrain("data", "inspect", "tokens", "--samples", "1", "--out", "pictures/l.png")
    assert (done.returncode, done.stderr) == (0, "wrote pictures/l.png\n")
    manifest = json.loads((tokens / "manifest.json").read_bytes())
    train = manifest["train"]
    assert f"  documents        {train['num_documents']:,}\n" in done.stdout
    assert f"  tokens           {train['num_tokens'] - 1:,}, of text " in done.stdout
    assert "  duplicates       0 equal an earlier document\n" in done.stdout
    assert "  also in train    0\n" in done.stdout
    assert "█" in done.stdout
    assert done.stdout.rstrip().endswith("┃<|endoftext|>┃")
    assert (tmp_path / "pictures" / "l.png").read_bytes()[:4] == b"\x89PNG"


def test_json_on_stdout_is_alone_there(tokens: Path, tmp_path: Path, run_mambatrain: Run) -> None:
    done = run_mambatrain("data", "inspect", "tokens", "--json", "-")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert sum(one["documents"] for one in report["train"]["histogram"]) == report["train"]["num_documents"]
    assert report["train"]["bytes_per_token"] > 1
    assert "documents" in done.stderr
    filed = run_mambatrain("data", "inspect", "tokens", "--json", "r/report.json", "--samples", "0")
    assert json.loads((tmp_path / "r" / "report.json").read_bytes()) == report
    assert "documents" in filed.stdout


def test_check_passes_and_fails_with_1(tokens: Path, run_mambatrain: Run) -> None:
    done = run_mambatrain("data", "check", "tokens")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.rsplit(": ")[-1] for line in done.stdout.splitlines()] == ["nothing wrong"] * 2
    ids = np.fromfile(tokens / "train.bin", dtype="<u2")
    ids[20] = 600
    ids.tofile(tokens / "train.bin")
    wrong = run_mambatrain("data", "check", "tokens", "--json", "-")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: tokens is not as it should be (2 found):\n  tokens/train.bin: not the bytes")
    assert "tokens/train.bin, document 1: its token 19 has id 600; the vocabulary has 512\n" in wrong.stderr
    assert json.loads(wrong.stdout)["problems"][1]["document"] == 1


def test_merge_and_split_make_folders_that_check(tokens: Path, tmp_path: Path, run_mambatrain: Run) -> None:
    split = run_mambatrain("data", "split", "tokens", "--held-out", "0.5", "--out", "half")
    assert split.returncode == 0, split.stderr
    assert split.stdout.splitlines()[-1] == "written to  half"
    merged = run_mambatrain("data", "merge", "tokens", "half", "--out", "both")
    assert merged.returncode == 0, merged.stderr
    assert run_mambatrain("data", "check", "both").returncode == 0
    report = json.loads(run_mambatrain("data", "inspect", "both", "--json", "-").stdout)
    # Every document is there twice, and half of what was trained on in one folder is held out in the other.
    assert report["train"]["num_duplicates"] + report["held_out"]["num_duplicates"] > 0
    assert report["held_out"]["num_also_in_train"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "half", "tokens"]


def test_a_bare_pair_is_inspected_as_it_is(tokens: Path, run_mambatrain: Run) -> None:
    for name in ("manifest.json", "tokenizer.json", "held_out.bin", "held_out.idx"):
        (tokens / name).unlink()
    done = run_mambatrain("data", "inspect", "tokens/train")
    assert done.returncode == 0, done.stderr
    assert "bytes per token  not known: no manifest says how many bytes the text has" in done.stdout
    assert "  end token        id 0\n" in done.stdout
    assert done.stderr == "note: no tokenizer lies beside the tokens: --tokenizer FILE shows their text\n"


@pytest.mark.parametrize("fraction", ["1", "-0.1"])
def test_a_fraction_that_is_none_is_a_usage_error(tokens: Path, run_mambatrain: Run, fraction: str) -> None:
    done = run_mambatrain("data", "split", "tokens", "--held-out", fraction, "--out", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not a fraction from 0 to below 1" in done.stderr


def test_show_marks_documents_and_numbers_them(
    tokens: Path, tmp_path: Path, run_mambatrain: Run, write_tiny_recipe: Callable[..., Path]
) -> None:
    recipe = write_tiny_recipe(data__shards="tokens", data__row_tokens=700)
    done = run_mambatrain("data", "show", str(recipe), "--step", "1", "--json", "shown.json")
    assert (done.returncode, done.stderr) == (0, "wrote shown.json\n")
    shown = json.loads((tmp_path / "shown.json").read_bytes())
    assert (shown["draw"], shown["rows_by_source"]) == (0, {"tokens": 4})
    assert [row["slot"] for row in shown["rows"]] == [0, 1, 2, 3]
    marks = [int(mark) for mark in re.findall(r"┃(\d+)┃<\|endoftext\|>", done.stdout)]
    assert marks  # a row of 700 tokens holds the start of a document in this corpus
    assert set(marks) <= {document for row in shown["rows"] for document in row["documents"]}
    assert len(marks) == sum(len(row["boundaries"]) for row in shown["rows"])
    assert done.stdout.endswith("draw 0: 4 rows, 4 of tokens\n")
    same = run_mambatrain("data", "show", str(recipe), "--draw", "0", "--json", "-", "--rows", "2")
    assert json.loads(same.stdout)["rows"] == shown["rows"][:2]


def test_show_marks_what_is_not_predicted(
    tmp_path: Path, run_mambatrain: Run, write_tiny_recipe: Callable[..., Path]
) -> None:
    from mambatrain.data.token_shards import TokenShardWriter

    with TokenShardWriter(tmp_path / "p", np.dtype("<u2")) as writer:
        for document in ([11, 12, 13], [21, 22], [31, 32, 33]):
            writer.append(np.array(document))
    recipe = write_tiny_recipe(data__shards="p", data__row_tokens=9)
    done = run_mambatrain("data", "show", str(recipe), "--step", "1", "--rows", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:3] == [
        "row 0: window 0 of p, epoch 0, documents 0, 1, 2",
        "┃0┃ 11 12 13┃1┃⟦ 21⟧ 22┃2┃⟦ 31⟧ 32 33",
        "[2 positions of padding, not counted]",
    ]


def test_show_says_that_a_carried_row_lies_in_a_stream(
    run_mambatrain: Run, write_tiny_recipe: Callable[..., Path]
) -> None:
    """No window of the shard has the number that such a row has."""
    done = run_mambatrain("data", "show", str(write_tiny_recipe(data__carry_state=True)), "--draw", "7", "--rows", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("row 0: its slot's stream of ")
    assert "window" not in done.stdout.splitlines()[0]


def test_show_looks_a_step_of_a_run_up_in_its_log(
    tmp_path: Path, tokens: Path, run_mambatrain: Run, write_tiny_recipe: Callable[..., Path]
) -> None:
    recipe = write_tiny_recipe(data__shards="tokens")
    (tmp_path / "run").mkdir()
    shutil.copy(recipe, tmp_path / "run" / "recipe.yaml")
    lines = [{"event": "step", "step": 1, "draw": 0}, {"event": "skipped", "step": 1, "draw": 1}]
    lines.append({"event": "step", "step": 2, "draw": 2})
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    of_run = run_mambatrain("data", "show", "run", "--step", "2", "--json", "-")
    of_draw = run_mambatrain("data", "show", str(recipe), "--draw", "2", "--json", "-")
    assert (of_run.returncode, of_run.stdout) == (0, of_draw.stdout)
    beyond = run_mambatrain("data", "show", "run", "--step", "3")
    assert beyond.returncode == 1
    assert beyond.stderr.startswith("error: run has not done step 3; its log ends at 2\n")
    neither = run_mambatrain("data", "show", "run")
    assert neither.stderr.startswith("error: a step or a draw must be named, and not both\n")


def test_control_characters_of_a_document_do_not_reach_the_terminal(
    tokens: Path, tmp_path: Path, run_mambatrain: Run, write_tiny_recipe: Callable[..., Path]
) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "red \x1b[31m bell \x07 end"}) + "\n" + '{"text": "x"}\n')
    done = run_mambatrain(
        "tokenize", "t.jsonl", "--tokenizer", "tokens/tokenizer.json", "--out", "t", "--held-out", "0"
    )
    assert done.returncode == 0, done.stderr
    recipe = write_tiny_recipe(data__shards="t")
    for arguments in (("inspect", "t"), ("show", str(recipe), "--step", "1", "--rows", "3")):
        shown = run_mambatrain("data", *arguments).stdout
        assert r"red \x1b[31m bell \x07 end" in shown
        assert not {"\x1b", "\x07"} & set(shown)
