"""GSM8K: grade-school word problems with worked answers, for fine-tuning.

A conversation is a question and its answer, which ends in `#### NUMBER` and has the calculations between `<<` and `>>`,
as the publisher has them.

Source:  https://huggingface.co/datasets/openai/gsm8k, main (arXiv 2110.14168)
Licence: MIT
Size:    7,473 conversations (1,319 in --split test), 4 MB of text
Time:    seconds
Example: python data_scripts/gsm8k.py --out data/gsm8k.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from corpus_writer import About, Row
from hub_corpus import HubCorpus, write_hub_corpus

CORPUS = HubCorpus(
    about=About("GSM8K", "https://huggingface.co/datasets/openai/gsm8k", "MIT"),
    dataset="openai/gsm8k",
    config="main",
    documents={"train": 7_473, "test": 1_319},
    needed={"question": str, "answer": str},
)


def into_conversations(rows: Iterable[Row]) -> Iterator[Row]:
    """A question by the user, an answer by the assistant."""
    for row in rows:
        said = (("user", row["question"]), ("assistant", row["answer"]))
        yield {"messages": [{"role": role, "content": content} for role, content in said]}


if __name__ == "__main__":
    write_hub_corpus(CORPUS, __doc__, into_conversations)
