"""What is done to documents before they are tokenized, and which are left out. Nothing is, unless it is asked for."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from tokenizers import Tokenizer

from mambatrain.data.documents import Document, DocumentReader
from mambatrain.data.manifest import CleaningOptions
from mambatrain.data.near_duplicates import signature_of
from mambatrain.data.pretokenizers import cut_of, cut_text
from mambatrain.data.sources import SourceFile
from mambatrain.data.text_fields import BETWEEN_TEXTS, TextFields
from mambatrain.data.tokenizer import MAX_UNCUT_CHARACTERS

DIGEST_BYTES = 16
_PIECE_CHARACTERS = 65_536  # of a long text that is normalized: Python takes ten times its memory for it
CONTAMINATED_WORDS = 13
"""Words in a row that a document shares with an evaluation text (GPT-3's figure, arXiv 2005.14165, appendix C)."""
MIN_CONTAMINATED_WORDS = 8
"""An evaluation text shorter than CONTAMINATED_WORDS counts as a whole, if it has this many words."""

# Scripts that are written without spaces: each character stands for a word.
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|\w+")


def words_of(text: str) -> list[str]:
    """Words in lower case without punctuation; in scripts without spaces every character is one."""
    return _WORD.findall(text.lower())


class CleanDocument(NamedTuple):
    """A document that is kept so far.

    Attributes:
        num_bytes: UTF-8 bytes of its text.
        digest: of its text, DIGEST_BYTES long; empty unless duplicates are looked for.
        signature: its MinHash; empty unless near-duplicates are looked for.
    """

    text: str
    origin: str
    num_bytes: int
    digest: bytes
    signature: bytes


class Cleaner:
    """Cleans documents one by one.

    Args:
        normalizes: whether the tokenizer's normalizer changes a text.
        evaluation: runs of words (`word_runs_of`) that no document may hold.

    Attributes:
        counts: of documents, by the names that the manifest has for them.
    """

    def __init__(
        self,
        options: CleaningOptions,
        normalizes: Callable[[str], bool] | None = None,
        evaluation: dict[int, set[str]] | None = None,
    ) -> None:
        self.options = options
        self.counts: Counter[str] = Counter()
        self._normalizes = normalizes
        self._evaluation = evaluation or {}

    def clean(self, documents: Iterable[Document]) -> Iterator[CleanDocument]:
        """What is kept of some documents. Nothing is read ahead."""
        options = self.options
        for document in documents:
            text = document.text
            if not text or text.isspace():
                self.counts["num_skipped_empty"] += 1
                continue
            if options.normalize is not None and not is_normalized(options.normalize, text):
                text = "".join(unicodedata.normalize(options.normalize, piece) for piece in _pieces(text))
                self.counts["num_normalized"] += 1
            why_left_out = self._why_left_out(text)
            if why_left_out is not None:
                self.counts[why_left_out] += 1
                continue
            self._count_oddities(text)
            num_bytes, digest = self._measure(text)
            signature = b"" if options.near_duplicates is None else signature_of(words_of(text))
            yield CleanDocument(text, document.origin, num_bytes, digest, signature)

    def _measure(self, text: str) -> tuple[int, bytes]:
        """UTF-8 bytes, and the digest if it is wanted."""
        if not self.options.deduplicate and text.isascii():
            return len(text), b""
        encoded = text.encode()
        digest = hashlib.blake2b(encoded, digest_size=DIGEST_BYTES).digest() if self.options.deduplicate else b""
        return len(encoded), digest

    def _why_left_out(self, text: str) -> str | None:
        if len(text) < self.options.min_characters:
            return "num_too_short"
        if self.options.max_characters is not None and len(text) > self.options.max_characters:
            return "num_too_long"
        if self._evaluation and _holds_any(text, self._evaluation):
            return "num_contaminated"
        return None

    def _count_oddities(self, text: str) -> None:
        if "\0" in text:
            self.counts["num_with_nul"] += 1
        if "\r\n" in text:
            self.counts["num_with_crlf"] += 1
        if self._normalizes is not None and self._normalizes(text):
            self.counts["num_changed_by_tokenizer"] += 1


def word_runs_of(files: Iterable[SourceFile]) -> dict[int, set[str]]:
    """The runs of words of evaluation files, by their number of words: every text that a row of them holds.

    Raises:
        UserError: a file cannot be read.
    """
    runs: dict[int, set[str]] = {}
    for document in DocumentReader(list(files), TextFields.everything()):
        for text in document.text.split(BETWEEN_TEXTS):
            words = words_of(text)
            length = min(len(words), CONTAMINATED_WORDS)
            if length >= MIN_CONTAMINATED_WORDS:
                runs.setdefault(length, set()).update(_runs(words, length))
    return runs


def normalizer_changes(tokenizer: Tokenizer) -> Callable[[str], bool] | None:
    """Whether a text is changed by a tokenizer before it is split; None where it has no normalizer."""
    normalizer = tokenizer.normalizer
    if normalizer is None:
        return None
    if type(normalizer).__name__ == "NFC":
        return lambda text: not is_normalized("NFC", text)  # the same, and many times faster
    # A longer text is refused when it comes to its encoding; the normalizer takes as much memory as that.
    return lambda text: len(text) <= MAX_UNCUT_CHARACTERS and normalizer.normalize_str(text) != text


def is_normalized(form: Literal["NFC", "NFKC"], text: str) -> bool:
    """Whether a text is in a Unicode normalization form, at little memory however long it is."""
    return text.isascii() or all(unicodedata.is_normalized(form, piece) for piece in _pieces(text))


def _pieces(text: str) -> Iterator[str]:
    """Whatever stands before a space, a line end or punctuation composes with nothing behind it."""
    return cut_text(text, _PIECE_CHARACTERS, cut_of("gpt-2"))


def _holds_any(text: str, runs: dict[int, set[str]]) -> bool:
    words = words_of(text)
    return any(not known.isdisjoint(_runs(words, length)) for length, known in runs.items())


def _runs(words: list[str], length: int) -> Iterator[str]:
    return (" ".join(words[first : first + length]) for first in range(len(words) - length + 1))
