"""FineWeb-Edu, a sample of 10 (or 100, or 350) billion tokens: web pages that a classifier found to educate.

Source:  https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu, sample-10BT (arXiv 2406.17557)
Licence: ODC-By 1.0; the pages themselves stand under Common Crawl's terms of use
Size:    about 9.7 million pages, 46 GB of text, 10 billion GPT-2 tokens
Time:    hours: the time of a download of 28 GB. --limit-documents 100000 gives about 0.5 GB of text
         The larger samples, --config sample-100BT and sample-350BT, are 10 and 35 times that
Example: python data_scripts/fineweb_edu.py --out data/fineweb_edu.jsonl
"""

from __future__ import annotations

from corpus_writer import About
from hub_corpus import HubCorpus, write_hub_corpus

CORPUS = HubCorpus(
    about=About("FineWeb-Edu", "https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu", "ODC-By-1.0"),
    dataset="HuggingFaceFW/fineweb-edu",
    config="sample-10BT",
    documents={"train": 9_672_101},
    kept=("id", "url"),
    configs=("sample-10BT", "sample-100BT", "sample-350BT"),
)

if __name__ == "__main__":
    write_hub_corpus(CORPUS, __doc__)
