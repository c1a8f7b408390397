"""Python files of GitHub, without duplicates, generated and minified ones: the corpus of CodeParrot.

A document is a file; its licence, repository and path stay with it. Unless --only says otherwise, only files under
permissive licences are taken.

Source:  https://huggingface.co/datasets/codeparrot/codeparrot-clean
Licence: that of each file, in the field `license`; by default MIT, Apache-2.0, BSD, ISC, Unlicense and CC0
Size:    about 5.4 million files, 50 GB; those under permissive licences are about half of it
Time:    hours: the time of a download of 13 GB. --limit-documents 100000 gives about 0.8 GB of text
Example: python data_scripts/github_python.py --out data/github_python.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from corpus_writer import About, Row
from hub_corpus import Groups, HubCorpus, write_hub_corpus

PERMISSIVE = ("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0")
CORPUS = HubCorpus(
    about=About(
        "Python files of GitHub",
        "https://huggingface.co/datasets/codeparrot/codeparrot-clean",
        "that of each file, in the field `license`",
    ),
    dataset="codeparrot/codeparrot-clean",
    config=None,
    documents={"train": 5_361_373},
    kept=("repo_name", "path"),
    needed={"content": str, "license": str},
    groups=Groups("license", "licences of the files that are taken, as the field `license` has them", (), PERMISSIVE),
)


def into_documents(rows: Iterable[Row]) -> Iterator[Row]:
    """The column `content` as `text`; empty files are passed over."""
    for row in rows:
        text = row.pop("content")
        if text.strip():
            yield {"text": text, **row}


if __name__ == "__main__":
    write_hub_corpus(CORPUS, __doc__, into_documents)
