"""TinyStories: short stories in the words of a four-year-old, written by GPT-3.5 and GPT-4.

Source:  https://huggingface.co/datasets/roneneldan/TinyStories (arXiv 2305.07759)
Licence: CDLA-Sharing-1.0
Size:    about 2.1 million stories, 1.9 GB of text, 470 million tokens
Time:    minutes to half an hour: the time of a download of 1 GB
Example: python data_scripts/tinystories.py --out data/tinystories.jsonl
"""

from __future__ import annotations

from corpus_writer import About
from hub_corpus import HubCorpus, write_hub_corpus

CORPUS = HubCorpus(
    about=About("TinyStories", "https://huggingface.co/datasets/roneneldan/TinyStories", "CDLA-Sharing-1.0"),
    dataset="roneneldan/TinyStories",
    config=None,
    documents={"train": 2_119_719, "validation": 21_990},
)

if __name__ == "__main__":
    write_hub_corpus(CORPUS, __doc__)
