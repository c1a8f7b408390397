"""What a tokenizer makes of a text, and what it is."""

from __future__ import annotations

from tokenizers import decoders, pre_tokenizers

from mambatrain.data.pretokenizers import pretokenizer_name
from mambatrain.data.tokenizer import LoadedTokenizer


def pieces_of(loaded: LoadedTokenizer, text: str) -> list[tuple[int, str]]:
    r"""Each token's id and its bytes as Python spells them: `' cat'`, or `b'\xe6\xbc'` for a part of a character."""
    ids = loaded.encode_batch([text])[0].tolist()
    return [(token, _spelled(loaded, token)) for token in ids]


def describe_tokenizer(loaded: LoadedTokenizer) -> list[str]:
    """What one wants to know before training with it."""
    name = pretokenizer_name(loaded.tokenizer)
    normalizer = loaded.tokenizer.normalizer
    return [
        f"tokenizer        {loaded.file}, {type(loaded.tokenizer.model).__name__}",
        f"tokens           {loaded.vocab_size:,}",
        f"end of document  {loaded.end_of_document} ({loaded.end_of_document_id})",
        f"pre-tokenizer    {name or 'not one that llama.cpp is known to name'}",
        f"normalizer       {'none: decoding gives the text' if normalizer is None else type(normalizer).__name__}",
        f"long documents   {'are cut; the tokens are the same' if loaded.cut else 'are encoded whole'}",
    ]


def _spelled(loaded: LoadedTokenizer, token: int) -> str:
    piece = str(loaded.tokenizer.id_to_token(token))
    if not isinstance(loaded.tokenizer.decoder, decoders.ByteLevel) or _is_added(loaded, token):
        return repr(piece)
    content = bytes(_BYTE_OF_CHARACTER[character] for character in piece)
    try:
        return repr(content.decode())
    except UnicodeDecodeError:
        return repr(content)


def _is_added(loaded: LoadedTokenizer, token: int) -> bool:
    return token in loaded.tokenizer.get_added_tokens_decoder()


def _spell_bytes() -> dict[str, int]:
    """GPT-2's spelling of bytes as characters: printable Latin-1 as it is, the rest from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    assert set(spelled) == set(pre_tokenizers.ByteLevel.alphabet())
    return spelled


_BYTE_OF_CHARACTER = _spell_bytes()
