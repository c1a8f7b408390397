"""Every document of some corpora comes back from its tokens.

    python tests/long/decode_all.py TOKENIZER.json CORPUS...

A document comes back as the tokenizer's normalizer left it: as its own bytes where it has none. Ends with 1 where one
does not. tests/parity/test_decoding.py shows it on a part of the corpora.
"""

from __future__ import annotations

import sys

from mambatrain.data.documents import Document, DocumentReader
from mambatrain.data.sources import find_sources
from mambatrain.data.tokenizer import LoadedTokenizer, load_tokenizer

DOCUMENTS_AT_ONCE = 500


def main() -> int:
    loaded, files = load_tokenizer(sys.argv[1]), find_sources(sys.argv[2:]).files
    wrong = 0
    for file in files:
        documents = list(DocumentReader([file]))
        different, changed = [], 0
        for first in range(0, len(documents), DOCUMENTS_AT_ONCE):
            bad, normalized = check(loaded, documents[first : first + DOCUMENTS_AT_ONCE])
            different += bad
            changed += normalized
        print(
            f"{file.name}: {len(documents):,} documents, {changed:,} normalized, {len(different):,} come back different"
        )
        for document in different[:5]:
            print(f"  {document.origin}")
        wrong += len(different)
    return int(wrong > 0)


def check(loaded: LoadedTokenizer, documents: list[Document]) -> tuple[list[Document], int]:
    """Documents that come back different from what the normalizer makes of them, and how many it changes."""
    normalizer = loaded.tokenizer.normalizer
    texts = [document.text for document in documents]
    wanted = texts if normalizer is None else [normalizer.normalize_str(text) for text in texts]
    decoded = [loaded.decode(ids.tolist()) for ids in loaded.encode_batch(texts)]
    bad = [document for document, got, want in zip(documents, decoded, wanted, strict=True) if got != want]
    return bad, sum(text != want for text, want in zip(texts, wanted, strict=True))


if __name__ == "__main__":
    sys.exit(main())
