from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from mambatrain.data.documents import MAX_BAD_NAMED, DocumentReader
from mambatrain.data.sources import find_sources
from mambatrain.data.text_fields import TextFields
from mambatrain.errors import UserError

NOT_UTF8 = "caf\xe9".encode("latin-1")


def reader_of(*files: Path, text_field: str = "text", skip_bad: bool = False) -> DocumentReader:
    return DocumentReader(find_sources(files).files, TextFields(text_field), skip_bad)


def texts(*files: Path, **options: Any) -> list[str]:
    return [document.text for document in reader_of(*files, **options)]


def refusal(file: Path, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        texts(file, **options)
    return caught.value


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def parquet_file(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)


def save_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, **options)
    return path


def arrow_stream(columns: dict[str, Any]) -> bytes:
    import pyarrow as pa

    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("ending", ["txt", "md"])
def test_text_is_kept_as_it_stands_but_for_the_mark_of_its_encoding(tmp_path: Path, ending: str) -> None:
    file = save(tmp_path / f"a.{ending}", b"\xef\xbb\xbfone\r\ntwo\rthree\n\xef\xbb\xbf\xc3\xa9\x00")
    assert texts(file) == ["one\r\ntwo\rthree\n\ufeffé\x00"]


def test_json_lines_keep_their_text_and_tell_their_line(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n\n  \n{"text": "\xe2\x80\xa8", "id": 3}\n{"text": ""}'
    for file in (save(tmp_path / "a.jsonl", content), save(tmp_path / "b.jsonl.gz", gzip.compress(content))):
        documents = list(reader_of(file))
        assert [document.text for document in documents] == ["a\r\nb", "\u2028", ""]
        assert [document.origin for document in documents] == [f"{file}:{line}" for line in (1, 4, 5)]


def packed_zstd(content: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression.zstd import compress
    else:
        from backports.zstd import compress
    return compress(content)


def test_packed_text_is_read_as_it_is_and_several_frames_to_their_end(tmp_path: Path) -> None:
    rows = [f"row {row} é" for row in range(5000)]
    content = lines(*({"text": row} for row in rows))
    cut = content.index(b"\n", len(content) // 2) + 1
    frames = packed_zstd(content[:cut]) + packed_zstd(content[cut:])
    assert texts(save(tmp_path / "a.jsonl.zst", frames)) == rows
    assert texts(save(tmp_path / "a.json.gz", gzip.compress(json.dumps([{"text": "x"}]).encode()))) == ["x"]
    for name, packed in (("b.txt.zst", packed_zstd(b"one\r\ntwo")), ("b.md.gz", gzip.compress(b"one\r\ntwo"))):
        assert texts(save(tmp_path / name, packed)) == ["one\r\ntwo"]


def test_json_and_arrow_files_tell_their_places(tmp_path: Path) -> None:
    import pyarrow as pa

    file = save(tmp_path / "a.json", b'[{"text": "one"},\n{"text": "two"}]')
    assert [(document.text, document.origin) for document in reader_of(file)] == [
        ("one", f"{file}:1"),
        ("two", f"{file}:2"),
    ]
    wanted = [f"row {row} é" for row in range(700)]
    table = pa.table({"n": list(range(700)), "text": wanted})
    for name, opener in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with opener(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
        documents = list(reader_of(tmp_path / name))
        assert [document.text for document in documents] == wanted
        assert documents[-1].origin == f"{tmp_path / name}:700"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet", "a.arrow", "a.txt"])
def test_reading_goes_on_from_every_place(tmp_path: Path, name: str) -> None:
    import pyarrow as pa

    rows = [{"text": f"row {row}"} for row in range(5)]
    content = lines(rows[0], rows[1]) + b"\n no \n" + lines(*rows[2:])
    if name == "a.parquet":
        save_parquet(tmp_path / name, {"text": [None if n == 3 else f"row {n}" for n in range(6)]}, row_group_size=2)
    elif name == "a.arrow":
        table = pa.table({"text": [None if n == 3 else f"row {n}" for n in range(6)]})
        with pa.ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        packed = {".gz": gzip.compress, ".zst": packed_zstd}.get(Path(name).suffix, bytes)
        listed = json.dumps([*rows[:2], 3, *rows[2:]]).encode()
        save(tmp_path / name, packed(listed if name == "a.json" else content))
    last = save(tmp_path / "z.txt", b"last")
    files = find_sources([tmp_path / name, last]).files
    reader = DocumentReader(files, skip_bad=True)
    seen = [(document, reader.place, reader.num_bad) for document in reader]
    assert len(seen) == (2 if name == "a.txt" else 6)
    for number, (_, place, num_bad) in enumerate(seen):
        rest = DocumentReader(files, skip_bad=True, start=place)
        assert list(rest) == [document for document, _, _ in seen[number + 1 :]]
        assert rest.num_bad + num_bad == reader.num_bad
        assert (rest.bytes_read, rest.place) == (reader.bytes_read, reader.place)


def test_gzip_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    content = gzip.compress(lines({"text": "one"})) + gzip.compress(lines({"text": "two"}))
    assert texts(save(tmp_path / "a.jsonl.gz", content)) == ["one", "two"]


def test_python_is_read_in_the_encoding_it_declares(tmp_path: Path) -> None:
    latin = save(tmp_path / "latin.py", "# coding: latin-1\r\nname = 'café'\r\n".encode("latin-1"))
    marked = save(tmp_path / "marked.py", b"\xef\xbb\xbfname = '\xc3\xa9'\n")
    assert texts(latin, marked) == ["# coding: latin-1\nname = 'café'\n", "name = 'é'\n"]
    assert [document.origin for document in reader_of(latin)] == [str(latin)]


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_gives_its_rows_over_all_row_groups(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa

    wanted = [f"row {row} é" for row in range(700)]
    column = pa.array(wanted, pa.large_string() if kind == "large_string" else pa.string())
    column = column.dictionary_encode() if kind == "dictionary" else column
    file = save_parquet(tmp_path / "a.parquet", {"n": list(range(700)), "body": column}, row_group_size=300)
    documents = list(reader_of(file, text_field="body"))
    assert [document.text for document in documents] == wanted
    assert documents[699].origin == f"{file}:700"


def test_bytes_read_rise_through_each_file_to_the_bytes_of_all(tmp_path: Path) -> None:
    digits = random.Random(0)
    rows = [f"{digits.randrange(10**300):x}" for _ in range(3000)]  # hardly smaller when packed
    content = lines(*({"text": row} for row in rows))
    files = [
        save(tmp_path / "a.jsonl", content),
        save(tmp_path / "b.jsonl.gz", gzip.compress(content)),
        save_parquet(tmp_path / "c.parquet", {"text": rows}),
        save(tmp_path / "d.txt", b"text"),
    ]
    sources = find_sources(files)
    reader = DocumentReader(sources.files)
    seen = [reader.bytes_read for _ in reader]
    assert seen == sorted(seen)
    for number in range(3):
        assert len(set(seen[3000 * number : 3000 * (number + 1)])) >= 3
    assert seen[2999] <= sources.files[0].num_bytes < seen[3100]
    assert reader.bytes_read == sources.num_bytes


BAD_FILES = {
    "a.txt": (b"fine\nnot fine " + NOT_UTF8, "a.txt:2 is not UTF-8", "iconv"),
    "b.md": (b"\xff\xfea\x00", "b.md:1 is not UTF-8: invalid start byte (byte 0xff)", "iconv"),
    "c.jsonl": (lines({"text": "x"}) + b'{"text": "' + NOT_UTF8 + b'"}\n', "c.jsonl:2 is not UTF-8", "iconv"),
    "d.jsonl": (b'{"text": "x"}\n{"text": \n', "d.jsonl:2 is not JSON: Expecting value", "--skip-bad"),
    "e.jsonl": (lines({"text": "x"}, ["y"]), "e.jsonl:2 is not a JSON object but a list", "--skip-bad"),
    "f.jsonl": (lines({"tex": "x"}), "f.jsonl:1 has no field `text`", "--text-field tex"),
    "g.jsonl": (lines({"body": "x", "id": 1}), "g.jsonl:1 has no field `text`", "--text-field names one of: body, id"),
    "h.jsonl": (lines({"text": None}), "h.jsonl:1 holds null in `text`, not text", "--skip-bad"),
    "i.jsonl": (lines({"text": 3}), "i.jsonl:1 holds a number in `text`, not text", "--skip-bad"),
    "j.jsonl": (b'{"text": "ab\\ud800"}\n', "j.jsonl:1 is not UTF-8: a lone surrogate at character 2", "--skip-bad"),
    "k.jsonl": (b"[" * 100_000 + b"\n", "k.jsonl:1 is not JSON: ", "--skip-bad"),
    "l.jsonl": (b'{"text": ' + b"9" * 5000 + b"}\n", "l.jsonl:1 is not JSON: ", "--skip-bad"),
    "m.py": (b"x = 1\ny = 2\nz = '" + NOT_UTF8 + b"'\n", "m.py is not in the encoding it declares (utf-8)", "--skip"),
    "n.py": (b"# coding: uft-8\n", "n.py declares no encoding it can be read in: unknown encoding", "--skip-bad"),
    "o.py": (b"x = '" + NOT_UTF8 + b"'\n", "o.py declares no encoding it can be read in", "--skip-bad"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_document_is_named_and_left_out_only_when_asked(tmp_path: Path, name: str) -> None:
    content, message, hint = BAD_FILES[name]
    file = save(tmp_path / name, content)
    error = refusal(file)
    assert error.message.startswith(f"{tmp_path}/{message}")
    assert error.hint is not None
    assert hint in error.hint
    assert "--skip-bad" in error.hint

    good = save(tmp_path / "z.txt", b"good")
    reader = reader_of(file, good, skip_bad=True)
    assert [document.text for document in reader][-1] == "good"
    assert reader.num_bad == 1
    assert reader.bad[0].startswith(f"{tmp_path}/{message}")


def test_the_first_bad_documents_are_named_and_all_are_counted(tmp_path: Path) -> None:
    reader = reader_of(save(tmp_path / "a.jsonl", b"no\n" * 50 + lines({"text": "yes"})), skip_bad=True)
    assert [document.text for document in reader] == ["yes"]
    assert (reader.num_bad, len(reader.bad)) == (50, MAX_BAD_NAMED)


def test_a_damaged_file_stops_even_when_bad_documents_are_left_out(tmp_path: Path) -> None:
    packed = gzip.compress(lines(*({"text": f"row {row}"} for row in range(5000))))
    words = [f"row {row} {row * row}" for row in range(2500)]
    parquet = save_parquet(tmp_path / "whole.parquet", {"text": ["some words"] * 100}).read_bytes()
    zstd = packed_zstd(lines(*({"text": f"row {row} {row * row}"} for row in range(5000))))
    arrow = arrow_stream({"text": ["some words"] * 100})
    groups = bytearray(save_parquet(tmp_path / "w.parquet", {"text": words}, row_group_size=500).read_bytes())
    at = parquet_file(tmp_path / "w.parquet").metadata.row_group(3).column(0).data_page_offset
    groups[at : at + 400] = bytes(400)
    flipped = packed[: len(packed) // 2] + bytes([packed[len(packed) // 2] ^ 0xFF]) + packed[len(packed) // 2 + 1 :]
    for name, content, message in (
        ("cut.jsonl.gz", packed[:-2000], "is truncated after line"),
        ("end.jsonl.gz", packed[:-4], "is truncated after line"),
        ("flip.jsonl.gz", flipped, "after line|is not JSON|not UTF-8"),
        ("crc.jsonl.gz", packed[:-8] + b"\0" * 8, "is damaged after line 4"),
        ("plain.jsonl.gz", lines({"text": "x"}), "is damaged after line 0: Not a gzipped file"),
        ("none.jsonl.gz", b"", "is empty, not a gzip file"),
        ("cut.parquet", parquet[:-100], "is damaged or not parquet"),
        ("head.parquet", parquet[:20], "is damaged or not parquet"),
        ("flip.parquet", bytes(groups), "is damaged or not parquet after row 1[0-9]{3}: "),
        ("none.parquet", b"", "is damaged or not parquet"),
        ("cut.jsonl.zst", zstd[:-2000], "is truncated after line"),
        ("end.jsonl.zst", zstd[:-1], "is truncated after line"),
        ("plain.jsonl.zst", lines({"text": "x"}), "is damaged after line 0: "),
        ("none.jsonl.zst", b"", "is empty, not a zstd file"),
        ("cut.txt.gz", packed[:-2000], "is truncated$"),
        ("cut.arrow", arrow[: len(arrow) // 2], "is damaged or not arrow"),
        ("none.arrow", b"", "is damaged or not arrow"),
    ):
        file = save(tmp_path / name, content)
        if name != "flip.jsonl.gz":
            assert refusal(file, skip_bad=True).hint == "copy or download it again"
        with pytest.raises(UserError, match=message) as caught:
            texts(file)
        assert caught.value.message.startswith(str(file))


def test_parquet_without_the_column_or_with_another_type_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    file = save_parquet(tmp_path / "a.parquet", {"texts": ["x"], "n": [1]})
    error = refusal(file, skip_bad=True)
    assert (error.message, error.hint) == (f"{file} has no column `text`", "--text-field texts")
    assert refusal(file, text_field="n").message == f"{file}:1 holds a number in `n`, not text"
    assert refusal(save_parquet(tmp_path / "b.parquet", {"text": ["x", None]})).message.endswith(
        "b.parquet:2 holds null in `text`, not text"
    )
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(NOT_UTF8))
    assert "c.parquet:1 is not UTF-8" in refusal(save_parquet(tmp_path / "c.parquet", {"text": broken})).message


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    file = save(tmp_path / "a.jsonl", lines({"text": "x"}))
    files = find_sources([file]).files
    file.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: No such file"):
        list(DocumentReader(files))
