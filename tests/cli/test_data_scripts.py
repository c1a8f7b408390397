"""The scripts of data_scripts/, on small local stand-ins of the corpora's schema."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "data_scripts"
WIKITEXT2 = ROOT.parent / "shared" / "data" / "pretrain" / "wikitext2" / "wiki.valid.tokens"


def run(script: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / f"{script}.py", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def rows_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def write_parquet(file: Path, columns: dict[str, list[Any]], **options: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), file, **options)
    return file


def test_the_standard_library_is_written_once(tmp_path: Path) -> None:
    done = run("python_stdlib", "--out", "lib.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "licence    PSF-2.0" in done.stdout
    rows = rows_of(tmp_path / "lib.jsonl")
    paths = [row["path"] for row in rows]
    assert paths == sorted(paths)
    assert len(rows) > 400
    assert {"abc.py", "json/decoder.py"} <= set(paths)
    folders = {part for path in paths for part in path.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not [path for path in paths if "_sysconfigdata_" in path]
    library = Path(sysconfig.get_paths()["stdlib"])
    text = rows[paths.index("json/decoder.py")]["text"]
    assert text == (library / "json" / "decoder.py").read_text(encoding="utf-8")

    record = json.loads((tmp_path / "lib.jsonl.manifest.json").read_bytes())
    assert record["about"]["licence"] == "PSF-2.0"
    assert record["options"]["python"].endswith(".".join(map(str, sys.version_info[:3])))
    assert record["num_documents"] == len(rows)
    assert record["num_text_bytes"] == sum(len(row["text"].encode()) for row in rows)
    assert record["sha256"] == hashlib.sha256((tmp_path / "lib.jsonl").read_bytes()).hexdigest()
    assert str(library) not in json.dumps(record)

    before = (tmp_path / "lib.jsonl").stat().st_mtime_ns
    again = run("python_stdlib", "--out", "lib.jsonl", cwd=tmp_path)
    assert again.stdout == "lib.jsonl was already written; it is used as it is\n" + done.stdout
    assert (tmp_path / "lib.jsonl").stat().st_mtime_ns == before
    other = run("python_stdlib", "--out", "lib.jsonl", "--include-tests", cwd=tmp_path)
    assert other.returncode == 1
    assert "include_tests: False -> True" in other.stderr
    assert "hint: --overwrite" in other.stderr
    (tmp_path / "lib.jsonl").write_bytes(b"x")
    assert "was changed since it was written" in run("python_stdlib", "--out", "lib.jsonl", cwd=tmp_path).stderr


def test_files_that_cannot_be_decoded_are_counted_and_named(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    (library / "test").mkdir(parents=True)
    (library / "a.py").write_bytes("# coding: latin-1\nx = 'é'\n".encode("latin-1"))
    (library / "b.py").write_bytes(b"x = '\xff'\n")
    (library / "c.py").write_bytes(b"# coding: uft-8\n")
    (library / "empty.py").touch()
    (library / "test" / "test_x.py").write_text("x\n", encoding="utf-8")
    program = f"""
import sys, sysconfig
sys.path.insert(0, {str(SCRIPTS)!r})
sysconfig.get_paths = lambda: {{"stdlib": {str(library)!r}}}
import python_stdlib
sys.argv = ["python_stdlib.py", "--out", "o.jsonl"]
python_stdlib.run_script(python_stdlib.main)
"""
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path / "o.jsonl") == [{"text": "# coding: latin-1\nx = 'é'\n", "path": "a.py"}]
    record = json.loads((tmp_path / "o.jsonl.manifest.json").read_bytes())
    assert record["num_failures"] == 2
    assert [failure.split(":")[0] for failure in record["failures"]] == ["b.py", "c.py"]
    assert str(tmp_path) not in json.dumps(record)
    assert "left out: b.py" in done.stderr


def test_stories_come_from_local_files(tmp_path: Path) -> None:
    texts = [f"story {n} é\n" for n in range(30)]
    write_parquet(tmp_path / "a.parquet", {"text": texts[:20]})
    write_parquet(tmp_path / "b.parquet", {"text": texts[20:]})
    done = run("tinystories", "--out", "t.jsonl", "--data-files", "a.parquet", "b.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path / "t.jsonl") == [{"text": text} for text in texts]
    record = json.loads((tmp_path / "t.jsonl.manifest.json").read_bytes())
    assert record["about"]["licence"] == "CDLA-Sharing-1.0"
    assert (
        record["options"]["data_files"]["a.parquet"]
        == hashlib.sha256((tmp_path / "a.parquet").read_bytes()).hexdigest()
    )


def test_the_first_pages_of_a_large_file_may_be_taken(tmp_path: Path) -> None:
    """The stream is left in the midst of many row groups, which must not abort the interpreter as it ends.

    A race: left open, it aborted 8 runs of 20 and 19 of 25 (Arrow 26); hence several runs.
    """
    texts = [f"page {n} " * 200 for n in range(5000)]
    numbers = [str(n) for n in range(5000)]
    pages = {"text": texts, "id": numbers, "url": numbers, "score": [4.5] * 5000}
    write_parquet(tmp_path / "c.parquet", pages, row_group_size=500)
    arguments = ("--out", "f.jsonl", "--data-files", "c.parquet", "--limit-documents", "7")
    for _ in range(5):
        done = run("fineweb_edu", *arguments, "--overwrite", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    assert rows_of(tmp_path / "f.jsonl")[6] == {"text": texts[6], "id": "6", "url": "6"}
    assert len(rows_of(tmp_path / "f.jsonl")) == 7
    assert "already written" in run("fineweb_edu", *arguments, cwd=tmp_path).stdout
    write_parquet(tmp_path / "c.parquet", {**pages, "text": texts[::-1]})
    assert "was made otherwise" in run("fineweb_edu", *arguments, cwd=tmp_path).stderr


def test_lines_of_wikitext_are_joined_to_articles(tmp_path: Path) -> None:
    first = [
        "",
        " = Homarus = \n",
        "",
        " A lobster . \n",
        " = = Life = = \n",
        "",
        " It is = x = here \n",
        " = x = \n",
        " so \n",
        " = y = \n",
        "",
    ]
    second = ["", "", " = Frank = \n", "", " A man . \n", " = = = Deep = = = \n", ""]
    rows = [{"text": line} for line in first + second]
    (tmp_path / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = run("wikitext103", "--out", "o.jsonl", "--data-files", "w.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["text"] for row in rows_of(tmp_path / "o.jsonl")] == ["".join(first), "".join(second)]


@pytest.mark.skipif(not WIKITEXT2.is_file(), reason="WikiText-2 of ../shared/data is not here")
def test_wikitext_has_the_articles_its_publisher_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation part is the same for WikiText-2 and 103: 60 articles."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    into_articles = importlib.import_module("wikitext103").into_articles
    lines = WIKITEXT2.read_text(encoding="utf-8").split("\n")
    rows = [{"text": line + "\n" if line.strip() else ""} for line in lines]
    articles = [article["text"] for article in into_articles(rows)]
    assert len(articles) == 60
    assert "".join(articles) == "".join(row["text"] for row in rows)


def test_mistakes_get_a_sentence_and_a_hint(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"texts": ["x"]})
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "b.csv").touch()
    for arguments, message, hint in (
        ("--out o.json --data-files a.parquet", "--out o.json does not end in .jsonl", "--out o.jsonl"),
        ("--out o.jsonl --data-files a.parqet", "a.parqet does not exist", "did you mean a.parquet?"),
        ("--out o.jsonl --data-files b.csv", "b.csv is neither a .parquet nor a .jsonl file", None),
        ("--out o.jsonl --data-files a.parquet", "has no column `text` that holds text", "the column `texts`?"),
        ("--out o.jsonl --data-files broken.parquet", "--data-files cannot be read: ", None),
        ("--out o.jsonl --data-files a.parquet --limit-documents 0", "--limit-documents 0 leaves no document", None),
    ):
        done = run("tinystories", *arguments.split(), cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert message in done.stderr
        assert hint is None or hint in done.stderr.partition("hint: ")[2]
        assert "Traceback" not in done.stderr
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["a.parquet", "b.csv", "broken.parquet"]


@pytest.mark.parametrize("script", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_each_script_tells_source_licence_size_and_time(script: str, tmp_path: Path) -> None:
    if script in {"corpus_writer", "hub_corpus"}:
        assert "--help" not in run(script, "--help", cwd=tmp_path).stdout  # shared code, no script
        return
    done = run(script, "--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("Source:", "Licence:", "Size:", "Time:", "Example:"):
        assert word in done.stdout
    assert f"`{script}.py`" in (SCRIPTS / "README.md").read_text(encoding="utf-8")
