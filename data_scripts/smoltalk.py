"""SmolTalk: the conversations that SmolLM2 was fine-tuned on, most of them written by models.

Each conversation keeps its `source`, the part of the mixture that it is from; --only takes some of them.

Source:  https://huggingface.co/datasets/HuggingFaceTB/smoltalk, all (arXiv 2502.02737)
Licence: Apache-2.0 for what was made for it; the parts from other data sets stand under theirs
Size:    1,043,917 conversations (54,948 in --split test), about 4 GB of text
Time:    half an hour: the time of a download of 2 GB
Example: python data_scripts/smoltalk.py --out data/smoltalk.jsonl --limit-documents 100000
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from corpus_writer import About, Row
from hub_corpus import Groups, HubCorpus, write_hub_corpus

CORPUS = HubCorpus(
    about=About("SmolTalk", "https://huggingface.co/datasets/HuggingFaceTB/smoltalk", "Apache-2.0 and its parts' own"),
    dataset="HuggingFaceTB/smoltalk",
    config="all",
    documents={"train": 1_043_917, "test": 54_948},
    needed={"messages": list, "source": str},
    groups=Groups("source", "parts of the mixture, for example everyday-conversations"),
)


def into_conversations(rows: Iterable[Row]) -> Iterator[Row]:
    """Role and content of each message, in that order."""
    for row in rows:
        messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
        yield {"messages": messages, "source": row["source"]}


if __name__ == "__main__":
    write_hub_corpus(CORPUS, __doc__, into_conversations)
