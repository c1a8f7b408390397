"""A SentencePiece `.model` as a tokenizer of the tokenizers package, compared with SentencePiece's own library.

One difference is left: a unigram model takes the name of a control symbol that stands in a text, `</s>`, for the
symbol. `tokenize` refuses the document then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from mambatrain.errors import UserError

_SPACE = "\u2581"  # how SentencePiece writes a space
_UNIGRAM, _BPE = 1, 2  # of its trainer's model_type
PROBES = (
    "Hello world",
    "  two  spaces,\ttab\nand a line  ",
    "It's 12,345.67 — naïve “quotes” … ﬁ ½ Ａ",
    "Привет, мир! 名前はまだ無い。 한국어 ไทย עברית \U0001f600\U0001f469\u200d\U0001f680",
    "e\u0301 \u00a0 x\u2581y <b> aaaaaaaaaaaaaaaaaaaa",
    "def f(x):\n    return x ** 2  # {}[]\\",
    "",
)


def load_sentencepiece(file: Path) -> Tokenizer:
    """The tokenizer in a `.model` file.

    Raises:
        UserError: the sentencepiece package is not installed, the file is no model of it, the kind of model is not
            known here, or the two libraries disagree on a text of PROBES.
    """
    processor, model = _open(file)
    tokenizer = _convert(file, model)
    symbols = [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]
    for text in (*PROBES, *(f"a {symbol} b{symbol}c" for symbol in symbols)):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        wanted = processor.encode(text, add_bos=False, add_eos=False)
        if ids != wanted:
            told = f"SentencePiece gives {wanted[:12]}, the converted tokenizer {ids[:12]}"
            raise UserError(
                f"{file} cannot be used: for {text!r} {told}",
                "convert it with the tools of the model it belongs to, and name the tokenizer.json",
            )
    return tokenizer


def _open(file: Path) -> tuple[Any, Any]:
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        hint = "pip install 'mambatrain[sentencepiece]'"
        raise UserError(f"{file} is read with the sentencepiece package, which is not installed", hint) from None
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    except RuntimeError as error:
        raise UserError(f"{file} is not a model of SentencePiece: {error}", "copy or download it again") from None
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(processor.serialized_model_proto())
    return processor, model


def _convert(file: Path, model: Any) -> Tokenizer:
    trainer, settings = model.trainer_spec, model.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    if trainer.model_type == _UNIGRAM:
        unknown = next(number for number, piece in enumerate(model.pieces) if piece.type == piece.UNKNOWN)
        tokenizer = Tokenizer(models.Unigram(pieces, unknown, trainer.byte_fallback))
    elif trainer.model_type == _BPE:
        tokenizer = Tokenizer(
            models.BPE(
                {piece: number for number, (piece, _) in enumerate(pieces)},
                _merges(model),
                unk_token=trainer.unk_piece,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
        )
    else:
        raise UserError(
            f"{file} is neither a unigram nor a BPE model of SentencePiece", "only these two are known here"
        )
    steps: list[Any] = []
    if settings.precompiled_charsmap:
        steps.append(normalizers.Precompiled(settings.precompiled_charsmap))
    if settings.remove_extra_whitespaces:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if settings.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    spell: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if settings.add_dummy_prefix:
        spell.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(spell)
    _add_symbols(tokenizer, model)
    return tokenizer


def _add_symbols(tokenizer: Tokenizer, model: Any) -> None:
    """Control symbols are not found in text; what a user defined is."""
    for piece in model.pieces:
        if piece.type in (piece.CONTROL, piece.UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == piece.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=False)])
    tokenizer.encode_special_tokens = True


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; SentencePiece makes the piece with the lowest id first.

    Symbols and bytes are not made of pieces: no text spells them.
    """
    ranks = {piece.piece: rank for rank, piece in enumerate(model.pieces) if piece.type == piece.NORMAL}
    merges = []
    for piece, rank in ranks.items():
        for cut in range(1, len(piece)):
            first, second = piece[:cut], piece[cut:]
            if first in ranks and second in ranks:
                merges.append((rank, ranks[first], ranks[second], (first, second)))
    return [pair for *_, pair in sorted(merges)]
