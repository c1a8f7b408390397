"""A prompt in, tokens out, at constant memory: what was read is held in the state alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mambatrain.generation.reading import Reader
from mambatrain.generation.sampling import SamplingSettings, sample


def open_document(prompt: Sequence[int], end_of_document: int) -> list[int]:
    """A prompt as training has shown documents: behind the end token of the one before."""
    return list(prompt) if list(prompt[:1]) == [end_of_document] else [end_of_document, *prompt]


def generate(
    reader: Reader, *, end_of_document: int, vocab_size: int, max_new_tokens: int, settings: SamplingSettings
) -> Iterator[int]:
    """Continues what a reader was given, one id at a time, until the document ends or max_new_tokens ids have come.

    Args:
        reader: was given a prompt, or starts from a state; each id that comes is given to it, too.
        end_of_document: the id that ends generation; it is neither given out nor to the reader.
        vocab_size: number of ids the tokenizer knows; the embedding's padding rows are never drawn.
        max_new_tokens: the most ids given.
        settings: how each is drawn; the same settings give the same ids. A repetition penalty is about all that was
            read, the end token left out: to end is no repetition.
    """
    generator = settings.generator()
    for _ in range(max_new_tokens):
        seen = reader.seen_ids - {end_of_document} if settings.repetition_penalty != 1.0 else ()
        token = sample(reader.logits(), settings, generator, seen, vocab_size)
        if token == end_of_document:
            return
        reader.add([token])
        yield token
