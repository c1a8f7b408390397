"""SlimPajama: the deduplicated mixture of seven sources after LLaMA's, in a sample of 6 billion tokens.

Each document keeps its `source`, so that the mixture may be made anew: --only writes some sources, a recipe's
`data.sources` gives each its weight (data_scripts/README.md has the publisher's).

Source:  https://huggingface.co/datasets/DKYoon/SlimPajama-6B, drawn evenly from cerebras/SlimPajama-627B
Licence: that of each source: Common Crawl's terms of use, ODC-By (C4), MIT, BSD and Apache (GitHub), CC-BY-SA
         (Wikipedia, StackExchange), the authors' own for ArXiv and for books, some of which are under copyright
Size:    about 5.5 million documents, 24 GB of text, 6 billion tokens
Time:    an hour or two: the time of a download of 14 GB
Example: python data_scripts/slimpajama.py --only RedPajamaWikipedia --out data/wikipedia.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from corpus_writer import About, Row
from hub_corpus import Groups, HubCorpus, write_hub_corpus

SOURCES = (
    "RedPajamaCommonCrawl",
    "RedPajamaC4",
    "RedPajamaGithub",
    "RedPajamaBook",
    "RedPajamaArXiv",
    "RedPajamaWikipedia",
    "RedPajamaStackExchange",
)
CORPUS = HubCorpus(
    about=About("SlimPajama, 6B", "https://huggingface.co/datasets/DKYoon/SlimPajama-6B", "that of each source"),
    dataset="DKYoon/SlimPajama-6B",
    config=None,
    documents={"train": 5_489_000, "validation": 9_347, "test": 9_346},
    needed={"text": str, "meta": dict},
    groups=Groups("source", "sources of the mixture", names=SOURCES),
)


def with_source(rows: Iterable[Row]) -> Iterator[Row]:
    """The source out of the rows' `meta`."""
    for row in rows:
        yield {"text": row["text"], "source": row["meta"].get("redpajama_set_name")}


if __name__ == "__main__":
    write_hub_corpus(CORPUS, __doc__, with_source)
