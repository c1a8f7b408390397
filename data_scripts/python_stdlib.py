"""The standard library of the Python that runs this: text that every machine already has, without a download.

One document a file, read with the encoding it declares. Left out are packages installed beside the library, files
that the build generated (`_sysconfigdata_*`), and, unless --include-tests says so, the test suites, which are long
and full of the same lines.

Source:  the installed Python (CPython, https://www.python.org)
Licence: PSF-2.0
Size:    730 files, 12 MB; with tests 1,758 files, 31 MB (Python 3.11)
Time:    seconds
Example: python data_scripts/python_stdlib.py --out data/python_stdlib.jsonl
"""

from __future__ import annotations

import argparse
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from corpus_writer import About, Failure, Row, run_script, write_corpus

from mambatrain.errors import UserError

INSTALLED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
GENERATED_PREFIX = "_sysconfigdata_"  # holds the paths and flags of one machine


def library_files(library: Path, include_tests: bool) -> list[Path]:
    """The library's own .py files, sorted by their path below `library`."""
    left_out = INSTALLED_FOLDERS if include_tests else INSTALLED_FOLDERS | TEST_FOLDERS
    files = []
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in left_out]
        files += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(GENERATED_PREFIX)
        ]
    return sorted(files, key=lambda file: file.relative_to(library).as_posix())


def read_documents(library: Path, files: list[Path]) -> Iterator[Row | Failure]:
    """One row a file; empty files (most `__init__.py`) are passed over."""
    for file in files:
        name = file.relative_to(library).as_posix()
        try:
            with tokenize.open(file) as stream:
                text = stream.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            yield Failure(name, str(error).replace(str(file), name))
            continue
        if text.strip():
            yield {"text": text, "path": name}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="where the documents go")
    parser.add_argument("--include-tests", action="store_true", help="read the library's test suites too")
    parser.add_argument("--overwrite", action="store_true", help="write anew what was made otherwise")
    arguments = parser.parse_args()
    library = Path(sysconfig.get_paths()["stdlib"])
    files = library_files(library, arguments.include_tests)
    if not files:
        raise UserError(f"there are no .py files in {library}", "run this with a Python that has its library as files")
    options = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "include_tests": arguments.include_tests,
    }
    about = About("Python standard library", "the installed Python, https://www.python.org", "PSF-2.0")
    write_corpus(arguments.out, about, options, lambda: read_documents(library, files), len(files), arguments.overwrite)


if __name__ == "__main__":
    run_script(main)
