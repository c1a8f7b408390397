"""Precision and recall of `--near-duplicates` on passages of which it is known how near they are.

    python tests/long/near_duplicates.py CORPUS... [--passages 2000] [--words 300] [--thresholds 0.5 0.7 0.8 0.9]

Passages of a corpus, and behind each an edited copy: a share of its words, from 0 to 20%, is replaced by other words
of the corpus, deleted, or preceded by another word. The truth is computed without MinHash, from the sets of word
5-grams themselves: a passage is near if its Jaccard similarity with one that stands before it and is kept reaches the
threshold. `doubtful` are those whose similarity lies within one standard error of the estimate (0.044) around it.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from mambatrain.data.cleaning import words_of
from mambatrain.data.documents import DocumentReader
from mambatrain.data.near_duplicates import NUM_HASHES, SHINGLE_WORDS, find_near_duplicates, signature_of
from mambatrain.data.sources import find_sources

EDIT_RATES = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
STANDARD_ERROR = 0.5 / NUM_HASHES**0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, nargs="+", help="documents, in the field `text`")
    parser.add_argument("--passages", type=int, default=2000, help="before they are copied; default: %(default)s")
    parser.add_argument("--words", type=int, default=300, help="of a passage; default: %(default)s")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    originals = passages(arguments.corpus, arguments.words)
    originals = rng.sample(originals, min(arguments.passages, len(originals)))
    documents = with_copies(originals, rng)
    signatures = np.frombuffer(b"".join(map(signature_of, documents)), dtype="<u4").reshape(-1, NUM_HASHES)
    print(f"{len(originals):,} passages of {arguments.words} words, each with a copy")
    print("threshold  truly near  found  precision  recall  wrong  of them doubtful")
    for threshold in arguments.thresholds:
        nearest = similarities_to_kept(documents, threshold)
        near = {number for number, similarity in enumerate(nearest) if similarity >= threshold}
        found = set(find_near_duplicates(signatures, range(len(documents)), threshold))
        wrong = near ^ found
        doubtful = sum(abs(nearest[number] - threshold) <= STANDARD_ERROR for number in wrong)
        precision, recall = len(near & found) / max(len(found), 1), len(near & found) / max(len(near), 1)
        print(
            f"{threshold:9.2f} {len(near):11,} {len(found):6,} {precision:10.4f} {recall:7.4f} {len(wrong):6,} "
            f"{doubtful:10,}",
            flush=True,
        )
        if threshold == 0.8:
            print_by_rate(nearest, near, found)
    return 0


def passages(corpus: list[Path], num_words: int) -> list[list[str]]:
    """The words of the corpus in pieces of one length; what is left over of a document is passed over."""
    found = []
    for document in DocumentReader(find_sources(corpus).files):
        words = words_of(document.text)
        found += [words[first : first + num_words] for first in range(0, len(words) - num_words + 1, num_words)]
    return found


def with_copies(originals: list[list[str]], rng: random.Random) -> list[list[str]]:
    """Each passage, and behind it its copy, edited at the rates in turn."""
    documents = []
    for number, words in enumerate(originals):
        rate = EDIT_RATES[number % len(EDIT_RATES)]
        copy: list[str] = []
        for word in words:
            if rng.random() >= rate:
                copy.append(word)
                continue
            other = rng.choice(rng.choice(originals))
            copy += rng.choice(([other], [], [other, word]))
        documents += [words, copy]
    return documents


def similarities_to_kept(documents: list[list[str]], threshold: float) -> list[float]:
    """The Jaccard similarity of each document with the nearest one before it that is itself kept, from the sets."""
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)  # of kept documents
    sizes: dict[int, int] = {}
    nearest = []
    for number, words in enumerate(documents):
        runs = {tuple(words[first : first + SHINGLE_WORDS]) for first in range(len(words) - SHINGLE_WORDS + 1)}
        shared = Counter(other for run in runs for other in holders.get(run, ()))
        nearest.append(max((n / (len(runs) + sizes[other] - n) for other, n in shared.items()), default=0.0))
        if nearest[-1] < threshold:
            sizes[number] = len(runs)
            for run in runs:
                holders[run].append(number)
    return nearest


def print_by_rate(nearest: list[float], near: set[int], found: set[int]) -> None:
    """The copies by the share of their words that was edited."""
    print("    edited  similarity  truly near  found")
    for number, rate in enumerate(EDIT_RATES):
        copies = range(2 * number + 1, len(nearest), 2 * len(EDIT_RATES))
        mean = sum(nearest[copy] for copy in copies) / max(len(copies), 1)
        parts = (sum(copy in which for copy in copies) / max(len(copies), 1) for which in (near, found))
        print(f"    {rate:6.1%} {mean:11.3f}", *(f"{part:9.1%}" for part in parts))


if __name__ == "__main__":
    sys.exit(main())
