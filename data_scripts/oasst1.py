"""OASST1: conversations of volunteers with one another, in 35 languages, one of them in the role of the assistant.

The data set has a message a row, in trees of replies that were ranked. Here each tree gives one conversation: from its
root along the best reply at every turn, as far as the last answer of the assistant. Trees without an answer give none.

Source:  https://huggingface.co/datasets/OpenAssistant/oasst1 (arXiv 2304.07327)
Licence: Apache-2.0
Size:    84,437 messages (4,401 in --split validation), 100 MB on the hub; about 9,800 conversations
Time:    a minute: the time of a download of 40 MB
Example: python data_scripts/oasst1.py --only en --out data/oasst1_en.jsonl
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

from corpus_writer import About, Row
from hub_corpus import Groups, HubCorpus, write_hub_corpus

ROLES = {"prompter": "user", "assistant": "assistant"}
CORPUS = HubCorpus(
    about=About("OASST1", "https://huggingface.co/datasets/OpenAssistant/oasst1", "Apache-2.0"),
    dataset="OpenAssistant/oasst1",
    config=None,
    documents={"train": 9_846, "validation": 518},
    kept=("parent_id", "rank", "deleted"),
    needed={"message_id": str, "text": str, "role": str, "lang": str},
    groups=Groups("lang", "languages, as the field `lang` has them: en, es, pt-BR, ..."),
)


def into_conversations(rows: Iterable[Row]) -> Iterator[Row]:
    """One conversation a tree, in the order of the roots. All messages are in memory."""
    replies: defaultdict[str | None, list[Row]] = defaultdict(list)  # by the message that they reply to
    for row in rows:
        if not row.get("deleted"):
            replies[row.get("parent_id")].append(row)
    for root in replies[None]:
        path = [root]
        while following := replies.get(path[-1]["message_id"]):
            path.append(min(following, key=_place))
        while path and path[-1]["role"] != "assistant":
            path.pop()
        if path:
            messages = [{"role": ROLES[row["role"]], "content": row["text"]} for row in path]
            yield {"messages": messages, "id": root["message_id"], "lang": root["lang"]}


def _place(reply: Row) -> float:
    """0 is the best; a reply that was not ranked comes behind those that were."""
    rank = reply.get("rank")
    return math.inf if rank is None else rank


if __name__ == "__main__":
    write_hub_corpus(CORPUS, __doc__, into_conversations)
