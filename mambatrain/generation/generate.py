"""A prompt in, tokens out, at constant memory: what was read is held in the state alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mambatrain.generation.sampling import SamplingSettings, sample
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.state import BlockState

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PREFILL_TOKENS = 4096  # read at once; bounds the memory of a long prompt and changes nothing else
UNSETTLED = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no character, or not one yet


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    end_of_document: int,
    vocab_size: int,
    max_new_tokens: int,
    settings: SamplingSettings,
) -> Iterator[int]:
    """Continues a prompt, one id at a time, until the document ends or max_new_tokens ids have come.

    The model has learnt documents that open with the end token of the one before: so does the prompt here, and as in
    training a document starts, with an empty state, at each end token in it.

    Args:
        model: in any dtype, on any device.
        prompt: token ids; none starts a document from nothing.
        end_of_document: the id that ends generation; it is not given out.
        vocab_size: number of ids the tokenizer knows; the embedding's padding rows are never drawn.
        max_new_tokens: the most ids given.
        settings: how each is drawn; the same settings give the same ids.
    """
    seen = list(prompt)
    opened = seen if seen[:1] == [end_of_document] else [end_of_document, *seen]
    generator = settings.generator()
    logits, state = read_prompt(model, opened, end_of_document)
    for index in range(max_new_tokens):
        token = sample(logits, settings, generator, seen, vocab_size)
        if token == end_of_document:
            return
        yield token
        seen.append(token)
        if index + 1 < max_new_tokens:
            logits, state = _advance(model, [token], end_of_document, state)


def read_prompt(model: LanguageModel, tokens: Sequence[int], end_of_document: int) -> tuple[Tensor, list[BlockState]]:
    """The logits (V,) behind the last token, and the state there; at least one token."""
    state: list[BlockState] | None = None
    for first in range(0, len(tokens), PREFILL_TOKENS):
        logits, state = _advance(model, tokens[first : first + PREFILL_TOKENS], end_of_document, state)
    assert state is not None, "a prompt opens with the end-of-document token"
    return logits, state


@torch.no_grad()
def _advance(
    model: LanguageModel, tokens: Sequence[int], end_of_document: int, state: list[BlockState] | None
) -> tuple[Tensor, list[BlockState]]:
    """Reads some more tokens; logits (V,) of the last position only."""
    row = torch.tensor([tokens], device=model.head_weight.device)  # (1, L)
    hidden, state = model.hidden_states(row, row == end_of_document, state)
    weight = model.head_weight
    return F.linear(hidden[0, -1].to(weight.dtype), weight), state


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer, before: Sequence[int] = ()) -> Iterator[str]:
    """Text as soon as it is known, never half a character.

    A token may end inside a UTF-8 character, which then decodes to U+FFFD: such an end is held back until what follows
    settles it. The pieces joined are the decoding of all tokens.

    Args:
        tokens: ids as they come.
        tokenizer: the one that made them.
        before: the ids of the prompt: some tokenizers spell a word's space by what precedes it.
    """
    # `seen` is what was shown last and what has come since; only this much is decoded again with each token.
    seen, num_shown_ids = list(before), len(before)
    text = tokenizer.decode(seen)
    num_shown = len(text)
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(seen)
        settled = text.rstrip(UNSETTLED)
        if len(settled) > num_shown:
            yield settled[num_shown:]
            num_shown = len(settled)
        if text == settled and (latest := tokenizer.decode(seen[num_shown_ids:])):
            seen = seen[num_shown_ids:]
            text, num_shown, num_shown_ids = latest, len(latest), len(seen)
    if len(text) > num_shown:
        yield text[num_shown:]
