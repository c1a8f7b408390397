"""`tokenize` against the tokenizer alone, and against `datasets.map(batched=True)`.

    python tests/long/tokenize_benchmark.py CORPUS.jsonl[.gz] TOKENIZER.json [--repeats 5] [--workers N]

The candidates take turns; medians each. `raw` is `encode_batch_fast` of the same tokenizer on texts that are in memory,
its results thrown away. `tokenize` is everything: digests, reading, unpacking, JSON, encoding, shuffling, writing and
syncing. `map` is what most people use: `table.map(lambda batch: tokenizer(batch["text"]), batched=True)` with the
tokenizer as transformers wraps it, from texts that are an Arrow table already into an Arrow file. `map, fast` calls
`encode_batch_fast` there and keeps nothing but the ids. Seconds of the processor stand beside those of the clock: on a
machine with other work only those compare.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mambatrain.data.documents import DocumentReader
from mambatrain.data.encode_documents import num_usable_cores
from mambatrain.data.manifest import TokenizeOptions
from mambatrain.data.sources import find_sources
from mambatrain.data.tokenize_corpus import HowToRead, tokenize_corpus

RAW_DOCUMENTS = 1000  # in one call: as datasets.map has it


def main() -> int:
    arguments = parse_arguments()
    texts = [document.text for document in DocumentReader(find_sources([arguments.corpus]).files)]
    num_bytes = sum(len(text.encode()) for text in texts)
    print(f"{len(texts):,} documents, {num_bytes:,} bytes of text; {num_usable_cores()} cores")
    print(f"medians of {arguments.repeats}")
    with tempfile.TemporaryDirectory() as folder:
        candidates = candidates_for(arguments, texts, Path(folder))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
        for _ in range(arguments.repeats):
            for name, run in candidates.items():
                times[name].append(timed(run))
    medians = {
        name: tuple(statistics.median(part) for part in zip(*pairs, strict=True)) for name, pairs in times.items()
    }
    for name, (wall, processor) in medians.items():
        print(f"{name:<9} {num_bytes / wall / 1e6:6.2f} MB/s  {wall:6.2f} s  {processor:6.2f} s of the processor")
    for other, goal in (("raw", " (goal 0.95)"), ("map", " (goal 2)"), ("map, fast", "")):
        wall, processor = (medians[other][part] / medians["tokenize"][part] for part in (0, 1))
        print(f"tokenize / {other}: {wall:.3f} by the clock{goal}, {processor:.3f} by the processor")
    return 0


def candidates_for(arguments: argparse.Namespace, texts: list[str], folder: Path) -> dict[str, Callable[[], None]]:
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    wrapped = PreTrainedTokenizerFast(tokenizer_file=str(arguments.tokenizer), model_max_length=10**9)
    table = datasets.Dataset.from_dict({"text": texts})
    numbers = iter(range(10**9))

    def raw() -> None:
        for first in range(0, len(texts), RAW_DOCUMENTS):
            tokenizer.encode_batch_fast(texts[first : first + RAW_DOCUMENTS], add_special_tokens=False)

    def tokenize() -> None:
        out = folder / str(next(numbers))
        how = HowToRead(num_workers=arguments.workers)
        tokenize_corpus([arguments.corpus], arguments.tokenizer, out, TokenizeOptions(), how=how)

    def fast(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encodings = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [encoding.ids for encoding in encodings]}

    def usual(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return dict(wrapped(batch["text"]))

    def map_by(function: Callable[[dict[str, list[str]]], dict[str, list[list[int]]]]) -> None:
        name = str(folder / f"{next(numbers)}.arrow")
        table.map(function, batched=True, remove_columns=["text"], cache_file_name=name, load_from_cache_file=False)

    return {
        "raw": raw,
        "tokenize": tokenize,
        "map": lambda: map_by(usual),
        "map, fast": lambda: map_by(fast),
    }


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the clock and of the processor, on all cores."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="documents, in the field `text`")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=None, help="default: one a core")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
