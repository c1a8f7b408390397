"""The scripts of data_scripts/ whose rows are no plain documents: mixtures, code, conversations; on small stand-ins."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from mambatrain.data.staging import only_writer_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "data_scripts"
GSM8K = ROOT.parent / "shared" / "data" / "sft" / "gsm8k.train.jsonl"


class Script:
    """Runs scripts in this process, where loading the datasets package costs once, on rows in `data.parquet`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(self, script: str, *arguments: str) -> tuple[Any, str, str]:
        """The exit code (a sentence where it is one), stdout, stderr."""
        files = () if "--data-files" in arguments else ("--data-files", "data.parquet")
        self.monkeypatch.setattr(sys, "argv", [f"{script}.py", "--out", "o.jsonl", *files, *arguments])
        code: Any = 0
        try:
            runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        return code, *self.capsys.readouterr()

    def rows(self, script: str, rows: list[dict[str, Any]], *arguments: str) -> list[Any]:
        """What a script makes of rows; its record fits them."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), self.folder / "data.parquet")
        code, _, told = self.run(script, "--overwrite", *arguments)
        assert code == 0, told
        written = [json.loads(line) for line in (self.folder / "o.jsonl").read_bytes().splitlines()]
        record = json.loads((self.folder / "o.jsonl.manifest.json").read_bytes())
        texts = [row["text"] for row in written if "text" in row]
        texts += [message["content"] for row in written for message in row.get("messages", ())]
        assert record["num_documents"] == len(written)
        assert record["num_text_bytes"] == sum(len(text.encode()) for text in texts) > 0
        return written


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    return Script(tmp_path, monkeypatch, capsys)


def said(*contents: str) -> list[dict[str, str]]:
    """A conversation, the user first."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def test_a_mixture_keeps_the_source_of_each_document(script: Script) -> None:
    sets = ["RedPajamaC4", "RedPajamaBook", "RedPajamaC4", "RedPajamaArXiv"]
    rows = [{"text": f"t{n}é", "meta": {"redpajama_set_name": name}, "x": n} for n, name in enumerate(sets)]
    expected = [{"text": f"t{n}é", "source": name} for n, name in enumerate(sets)]
    assert script.rows("slimpajama", rows) == expected
    some = script.rows("slimpajama", rows, "--only", "RedPajamaArXiv", "RedPajamaBook")
    assert some == [expected[1], expected[3]]
    assert script.rows("slimpajama", rows, "--only", "RedPajamaC4", "--limit-documents", "1") == expected[:1]
    code, _, _ = script.run("slimpajama", "--limit-documents", "1")
    assert "  only: ['RedPajamaC4'] -> []" in code
    code, _, told = script.run("slimpajama", "--only", "RedPajamaC5")
    assert (code, "RedPajamaStackExchange" in told) == (2, True)


def test_code_is_taken_under_permissive_licences(script: Script) -> None:
    licences = ["mit", "gpl-3.0", "apache-2.0", "mit", "agpl-3.0"]
    rows = [
        {
            "repo_name": "a/b",
            "path": f"{n}.py",
            "size": "3",
            "content": f"x = {n}\n" if n != 3 else " \n",
            "license": name,
        }
        for n, name in enumerate(licences)
    ]
    expected = [
        {"text": f"x = {n}\n", "license": name, "repo_name": "a/b", "path": f"{n}.py"}
        for n, name in enumerate(licences)
        if n != 3  # an empty file
    ]
    assert script.rows("github_python", rows) == [expected[0], expected[2]]
    assert script.rows("github_python", rows, "--only", "gpl-3.0") == [expected[1]]
    code, _, _ = script.run("github_python", "--overwrite", "--only", "wtfpl")
    assert str(code).startswith("error: there is nothing to write to o.jsonl\n")


def test_the_best_answer_at_every_turn_makes_a_conversation(script: Script) -> None:
    def message(name: str, parent: str | None, rank: int | None, **more: Any) -> dict[str, Any]:
        role = "prompter" if name.count(".") % 2 == 0 else "assistant"
        row = {"message_id": name, "parent_id": parent, "text": f"text {name}", "role": role, "lang": "en"}
        return {**row, "rank": rank, "deleted": False, "tree_state": "ready_for_export", **more}

    rows = [
        message("a", None, None),
        message("b", None, None, lang="de"),
        message("a.1", "a", 1),
        message("a.0", "a", 0),
        message("a.2", "a", None),
        message("a.1.0", "a.1", 0),
        message("a.0.1", "a.0", None),
        message("a.0.0", "a.0", 3),
        message("b.x", "b", 0, deleted=True),
        message("b.0", "b", 1, lang="de"),
        message("a.0.0.0", "a.0.0", None),
        message("b.0.0", "b.0", 0, lang="de"),  # nobody answered
        message("c", None, None),  # nor here
    ]
    english = {"messages": said("text a", "text a.0", "text a.0.0", "text a.0.0.0"), "id": "a", "lang": "en"}
    german = {"messages": said("text b", "text b.0"), "id": "b", "lang": "de"}
    assert script.rows("oasst1", rows) == [english, german]
    assert script.rows("oasst1", rows, "--only", "de") == [german]


def test_messages_are_taken_as_they_are(script: Script) -> None:
    system = [{"role": "system", "content": "short"}, *said("hé", "ho", "hm", "ha")]
    rows = [{"messages": system, "source": "one"}, {"messages": said("a", "b"), "source": "two"}]
    assert script.rows("smoltalk", rows) == rows
    assert script.rows("smoltalk", rows, "--only", "two") == rows[1:]


def test_questions_and_answers_make_conversations(script: Script) -> None:
    rows = [{"question": f"How many {n}?", "answer": f"<<1+{n}={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(3)]
    expected = [{"messages": said(row["question"], row["answer"])} for row in rows]
    assert script.rows("gsm8k", rows) == expected
    code, _, _ = script.run("smoltalk", "--overwrite")
    assert "error: the data set has no column `messages` that holds a list" in code
    assert "hint: its columns are question, answer" in code


def test_two_processes_on_one_output(script: Script) -> None:
    """What the first is writing is left alone."""
    rows = [{"question": "a", "answer": "b"}]
    script.rows("gsm8k", rows)
    before = (script.folder / "o.jsonl").read_bytes()
    (script.folder / ".o.jsonl.partial").write_bytes(b"half")
    with only_writer_of(script.folder / "o.jsonl"):
        code, _, _ = script.run("gsm8k", "--overwrite")
    assert str(code).startswith("error: o.jsonl is being written by another process\n\nhint: wait for it")
    assert (script.folder / "o.jsonl").read_bytes() == before
    assert (script.folder / ".o.jsonl.partial").read_bytes() == b"half"


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K of ../shared/data is not here")
def test_gsm8k_has_as_many_as_its_script_says(script: Script) -> None:
    _, told, _ = script.run("gsm8k", "--data-files", str(GSM8K))
    assert "documents  7,473\n" in told
