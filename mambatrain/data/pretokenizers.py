"""How text is split before byte-level BPE merges within each part: ways that llama.cpp knows by name.

A tokenizer that is trained here splits in one of these ways, so that it can be converted; and of one that splits in any
of them it is known where a long text may be cut without changing a token (`safe_cut`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

PretokenizerName = Literal["gpt-2", "llama-bpe", "qwen2", "smollm"]
"""llama.cpp's names: GPT-2's pattern; those of Llama 3 and Qwen 2; single digits, then GPT-2's pattern."""

PRETOKENIZER_NAMES: tuple[PretokenizerName, ...] = get_args(PretokenizerName)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_NUMBERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_AFTER_NUMBERS}"
QWEN2_PATTERN = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_AFTER_NUMBERS}"

# The second halves of a cut: they join nothing before them, compose with nothing under NFC, and are neither letters nor
# marks in any version of Unicode. The apostrophe is missing: GPT-4o's pattern joins "'s" to the word before.
_BREAKS = (
    r'0-9.,;:!?()\[\]{}<>"/\\+=*&%$#@|~^_\-\u3001\u3002\uff0c\uff0e\uff01\uff1f\uff1a\uff1b\u300c\u300d\u2014\u2026'
)
# The first halves: letters that were letters in every version of Unicode that a tokenizer may know.
_LETTERS = (
    r"A-Za-z\u0391-\u03a1\u03b1-\u03c9\u0410-\u044f\u05d0-\u05ea\u0621-\u063a\u0e01-\u0e2e\u3041-\u3096\u30a1-\u30fa"
)
_LETTERS += r"\u4e00-\u9fa5\uac00-\ud7a3"

_CUT_EVERYWHERE = rf"\S(?= )|[{_LETTERS}](?=[{_BREAKS}])"
_SAFE_CUT = re.compile(_CUT_EVERYWHERE)
_SAFE_CUT_GPT2 = re.compile(rf"\S(?=\n)|{_CUT_EVERYWHERE}")


def make_pretokenizer(name: PretokenizerName) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of that name; bytes are spelled as GPT-2 spells them."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return gpt2
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    pattern = LLAMA3_PATTERN if name == "llama-bpe" else QWEN2_PATTERN
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), spell])


def pretokenizer_name(tokenizer: Tokenizer) -> PretokenizerName | None:
    """Which of the known ways a tokenizer splits text; None: another."""
    steps = _steps(_settings(tokenizer.pre_tokenizer))
    return next((name for name in PRETOKENIZER_NAMES if steps == _steps(_settings(make_pretokenizer(name)))), None)


def safe_cut(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    r"""A pattern whose every match ends where a text may be cut: both parts, encoded alone, give the whole's tokens.

    Known for tokenizers that split in one of the ways above and change nothing of the text, or compose it (NFC). A cut
    lies between `X` and `Y` where

    - X is anything but white space and Y a space (under GPT-2's pattern a newline, too), or X a letter and Y a digit
      or punctuation. No alternative of the patterns matches X and Y together, so that a part ends there whatever
      stands around it.
    - What is before is split as in the whole: the only look ahead, `\s+(?!\S)`, is from white space, and X is none.
    - What is behind, too: no alternative looks behind, and matching goes from left to right.
    - NFC composes neither Y with X nor anything across them.
    - No added token spans X and Y or takes white space from its sides. (Special ones are not looked for in text.)

    Python's `\S` is what a tokenizer's is, less four control characters.
    """
    name = pretokenizer_name(tokenizer)
    known_normalizer = _settings(tokenizer.normalizer) in (None, {"type": "NFC"})
    if name is None or not known_normalizer or not isinstance(tokenizer.model, models.BPE):
        return None
    cut = cut_of(name)
    for token in tokenizer.get_added_tokens_decoder().values():
        reaches_out = token.lstrip or token.rstrip or token.single_word
        if not token.special and (reaches_out or cut.search(token.content)):
            return None
    return cut


def cut_of(name: PretokenizerName) -> re.Pattern[str]:
    """Where text that is split in this way may be cut, see `safe_cut`."""
    return _SAFE_CUT_GPT2 if name in ("gpt-2", "smollm") else _SAFE_CUT


def cut_text(text: str, num_characters: int, cut: re.Pattern[str]) -> Iterator[str]:
    """Pieces that join to the text; each but the last ends at the first match of `cut` behind `num_characters`.

    A piece is longer where no place to cut comes sooner.
    """
    start = 0
    while len(text) - start > num_characters:
        place = cut.search(text, start + num_characters - 1)
        if place is None:
            break
        yield text[start : place.end()]
        start = place.end()
    yield text[start:]


def _settings(component: Any) -> Any:
    """What a `tokenizer.json` says of a pre-tokenizer or normalizer; writing the whole file takes far longer."""
    return None if component is None else json.loads(component.__getstate__())


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A pre-tokenizer's steps without what changes no split: how offsets are told, defaults that may be left out."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    step = {key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}
    if step["type"] == "ByteLevel":
        step.setdefault("use_regex", True)
    return [step]
