"""How much memory `tokenize` takes for a large corpus: by default 1 GB of documents in under 1 GB.

    python tests/long/tokenize_memory.py CORPUS.jsonl[.gz] TOKENIZER.json [--megabytes 1000] [--longest 200]

The corpus that is tokenized is made of the documents of CORPUS, over and over: some as they are, some joined into
documents of 1 and of 23 MB without a line end, and one of --longest MB. Ends with 1 where memory passes --limit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mambatrain.data.documents import DocumentReader
from mambatrain.data.sources import find_sources

# What this process itself held at most: what the system tells the parent counts the parent's own memory, too.
TOKENIZE = """
import re, sys
from pathlib import Path
from mambatrain.cli import app
app(sys.argv[1:], standalone_mode=False)
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="documents, in the field `text`")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--megabytes", type=int, default=1000, help="of text; default: %(default)s")
    parser.add_argument("--longest", type=int, default=200, help="MB of the longest document; default: %(default)s")
    parser.add_argument("--limit", type=int, default=1000, help="MB of memory; default: %(default)s")
    arguments = parser.parse_args()
    texts = [document.text for document in DocumentReader(find_sources([arguments.corpus]).files)]
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "corpus.jsonl"
        num_bytes = 0
        with source.open("w", encoding="utf-8") as lines:
            for text in documents(texts, arguments.longest):
                lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                num_bytes += len(text.encode())
                if num_bytes >= arguments.megabytes * 1_000_000:
                    break
        started = time.monotonic()
        command = [sys.executable, "-P", "-c", TOKENIZE, "tokenize", source, "--out", Path(name) / "out"]
        done = subprocess.run(
            [*command, "--tokenizer", arguments.tokenizer], stdout=subprocess.PIPE, text=True, check=True
        )
        seconds = time.monotonic() - started
    found = re.search(r"peak (\d+)", done.stdout)
    assert found is not None
    peak = int(found[1]) // 1000
    print(done.stdout.rsplit("\n", 2)[0])
    print(f"{num_bytes:,} bytes of text in {seconds:.0f} s; at most {peak:,} MB of memory (limit {arguments.limit:,})")
    return int(peak > arguments.limit)


def documents(texts: list[str], longest: int) -> Iterator[str]:
    """Without end; the longest comes first."""
    flat = " ".join(text.replace("\n", " ") for text in texts)
    yield (flat * (longest * 1_000_000 // len(flat) + 1))[: longest * 1_000_000]
    while True:
        yield (flat * (23_000_000 // len(flat) + 1))[:23_000_000]
        for first in range(0, len(flat), 1_000_000):
            yield flat[first : first + 1_000_000]
        yield from texts


if __name__ == "__main__":
    sys.exit(main())
