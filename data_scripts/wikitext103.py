"""WikiText-103 (raw): the articles of the English Wikipedia that were good or featured in 2016.

The data set has a line a row; here an article is a document, from its heading to the next.

Source:  https://huggingface.co/datasets/Salesforce/wikitext, wikitext-103-raw-v1 (arXiv 1609.07843)
Licence: CC-BY-SA-3.0 and GFDL
Size:    about 28,500 articles, 0.54 GB of text, 103 million words
Time:    minutes: the time of a download of 0.3 GB
Example: python data_scripts/wikitext103.py --out data/wikitext103.jsonl
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from corpus_writer import About, Row
from hub_corpus import HubCorpus, write_hub_corpus

CORPUS = HubCorpus(
    about=About("WikiText-103 raw", "https://huggingface.co/datasets/Salesforce/wikitext", "CC-BY-SA-3.0, GFDL"),
    dataset="Salesforce/wikitext",
    config="wikitext-103-raw-v1",
    documents={"train": 28_475, "validation": 60, "test": 60},
)

_TITLE = re.compile(r" = (?!= ).*(?<! =) = ")  # ` = Title = `, while ` = = Section = = ` is within an article


def into_articles(rows: Iterable[Row]) -> Iterator[Row]:
    """Joins rows of lines to articles. A title stands between two blank lines, which a formula does not."""
    article: list[str] = []
    before, title = "", ""  # the line before, and a line that may turn out to be a title
    for row in rows:
        line = row["text"]
        if title and not line.strip():
            if any(part.strip() for part in article):
                yield {"text": "".join(article)}
            article = []
        if title:
            article.append(title)
        title = line if not before.strip() and _TITLE.fullmatch(line.rstrip("\n")) else ""
        if not title:
            article.append(line)
        before = line
    article.append(title)
    if any(part.strip() for part in article):
        yield {"text": "".join(article)}


if __name__ == "__main__":
    write_hub_corpus(CORPUS, __doc__, into_articles)
