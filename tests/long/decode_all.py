"""Every document of some corpora, tokenized into shards, comes back from them.

    python tests/long/decode_all.py TOKENIZER.json CORPUS... [--text-field NAME]

Each corpus is tokenized as `mambatrain tokenize` does it, and every document of the shards is decoded. It must be what
Unicode's own NFC makes of its text where the tokenizer normalizes so, and its very text where the tokenizer has no
normalizer; the manifest must count the documents that differ from their text. Ends with 1 where anything else comes
back. tests/parity/test_decoding.py shows it on a part of three corpora.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import unicodedata
from collections import Counter
from hashlib import sha256
from pathlib import Path

from mambatrain.data.documents import DocumentReader
from mambatrain.data.manifest import TokenizeOptions
from mambatrain.data.sources import SourceFile, find_sources
from mambatrain.data.text_fields import TextFields
from mambatrain.data.token_corpus import TokenCorpus
from mambatrain.data.tokenize_corpus import tokenize_corpus
from mambatrain.data.tokenizer import LoadedTokenizer, load_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("corpus", type=Path, nargs="+")
    parser.add_argument("--text-field", default="text")
    arguments = parser.parse_args()
    loaded = load_tokenizer(arguments.tokenizer)
    normalizer = type(loaded.tokenizer.normalizer).__name__ if loaded.tokenizer.normalizer is not None else None
    if normalizer not in (None, "NFC"):
        sys.exit(f"{arguments.tokenizer} normalizes by {normalizer}; what should come back is known for none and NFC")
    different = 0
    for file in find_sources(arguments.corpus).files:
        different += compare(file, arguments.tokenizer, loaded, normalizer, arguments.text_field)
    return int(different > 0)


def compare(file: SourceFile, tokenizer: Path, loaded: LoadedTokenizer, normalizer: str | None, field: str) -> int:
    """Documents of one file that do not come back, and documents wrongly counted as changed."""
    wanted: Counter[bytes] = Counter()
    num_changed = 0
    for document in DocumentReader([file], TextFields(field)):
        if not document.text.strip():
            continue
        want = unicodedata.normalize("NFC", document.text) if normalizer == "NFC" else document.text
        num_changed += want != document.text
        wanted[sha256(want.encode()).digest()] += 1
    with tempfile.TemporaryDirectory() as folder:
        options = TokenizeOptions(text_field=field)
        corpus = tokenize_corpus([file.path], tokenizer, Path(folder) / "out", options).corpus
        came_back = decoded_documents(corpus, loaded)
    lost = (wanted - came_back).total() + (came_back - wanted).total()
    counted = corpus.manifest.num_changed_by_tokenizer
    print(
        f"{file.path.name}: {wanted.total():,} documents, {num_changed:,} changed by the normalizer "
        f"({counted:,} in the manifest), {lost:,} come back different",
        flush=True,
    )
    return lost + abs(counted - num_changed)


def decoded_documents(corpus: TokenCorpus, loaded: LoadedTokenizer) -> Counter[bytes]:
    """Digest of each document's text as the shards have it, and how often it is there."""
    found: Counter[bytes] = Counter()
    for shard in (corpus.train, corpus.held_out):
        for number in range(1, shard.num_documents):  # document 0 is the end token that opens the shard
            *ids, end = shard.document(number).tolist()
            assert end == loaded.end_of_document_id
            found[sha256(loaded.decode(ids).encode()).digest()] += 1
    return found


if __name__ == "__main__":
    sys.exit(main())
