"""A document of any length into a state, at constant memory."""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from mambatrain.data.tokenizer import MAX_UNCUT_CHARACTERS, LoadedTokenizer
from mambatrain.errors import UserError
from mambatrain.generation.reading import Reader

READ_BYTES = 1 << 16


def read_document(
    file: Path, reader: Reader, tokenizer: LoadedTokenizer, progress: Callable[[int], None] | None = None
) -> None:
    """Gives a reader the text of a UTF-8 file.

    It is encoded in pieces, cut where the tokenizer allows it: the tokens are those of the whole text.

    Args:
        file: text; nothing in it is taken for a special token.
        reader: what it was given before stands before the text.
        tokenizer: of the model.
        progress: is told the bytes read so far, after each piece.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or is too long for a tokenizer that lets nothing be cut.
    """
    for piece, num_bytes in iter_pieces(file, tokenizer.cut):
        reader.add(tokenizer.encode_batch([piece])[0].tolist())
        if progress is not None:
            progress(num_bytes)


def iter_pieces(file: Path, cut: re.Pattern[str] | None) -> Iterator[tuple[str, int]]:
    """Pieces that join to the text, with the bytes of the file read so far.

    Each but the last ends at a match of `cut`, or is longer than what is encoded at once and will be refused.
    """
    held: list[str] = []  # joined once, however many reads a text without a place to cut takes
    num_held, num_bytes = 0, 0
    for text, num_bytes in _read_text(file):
        end = 0 if cut is None else _last_cut(text, cut)
        if end or num_held > MAX_UNCUT_CHARACTERS:
            yield "".join([*held, text[:end]]), num_bytes
            held, num_held = [], 0
        held.append(text[end:])
        num_held += len(text) - end
    if num_held:
        yield "".join(held), num_bytes


def _last_cut(text: str, cut: re.Pattern[str]) -> int:
    """Where the last match ends, 0 without one."""
    last = deque(cut.finditer(text), maxlen=1)
    return last[0].end() if last else 0


def _read_text(file: Path) -> Iterator[tuple[str, int]]:
    """Text as it stands, line ends included, and the bytes read so far."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_bytes = 0
    try:
        with file.open("rb") as content:
            while True:
                read = content.read(READ_BYTES)
                num_held = len(decoder.getstate()[0])  # bytes of a character that the last read ended in
                try:
                    text = decoder.decode(read, final=not read)
                except UnicodeDecodeError as error:
                    bad = num_bytes - num_held + error.start
                    raise UserError(f"{file} is not UTF-8: byte {bad:,}", "convert it, e.g. with iconv") from error
                num_bytes += len(read)
                if text:
                    yield text, num_bytes
                if not read:
                    return
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}", "name a text file") from error
