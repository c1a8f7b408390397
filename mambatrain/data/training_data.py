"""From the data section of a recipe to an order of rows: sources are opened and compared with each other."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from mambatrain.data.batches import Windows
from mambatrain.data.document_rows import DocumentRows
from mambatrain.data.document_streams import DocumentStreams
from mambatrain.data.held_out_batches import HeldOutBatches
from mambatrain.data.open_tokens import Tokens, open_tokens
from mambatrain.data.packing import open_packing
from mambatrain.data.pair_rows import PairRows
from mambatrain.data.token_corpus import verify_token_corpus
from mambatrain.data.tokenizer import encode_alike
from mambatrain.data.training_order import AnyWindows, OrderStage, Source, TrainingOrder
from mambatrain.errors import UserError
from mambatrain.recipe.data_section import CHATS, SourceSection
from mambatrain.recipe.sections import Recipe


@dataclass(frozen=True)
class TrainingData:
    """What a recipe trains on.

    Attributes:
        sources: name in the recipe -> tokens, each once, in the order of appearance.
        held_out: what the held-out loss is measured on; None: nothing is held out.
        tokenizer_file: of all sources; None: not known.
        digest: of all tokens, hex.
    """

    sources: dict[str, Tokens]
    order: TrainingOrder
    held_out: HeldOutBatches | None
    tokenizer_file: Path | None
    digest: str

    def verify(self) -> None:
        """Compares every file that has a manifest with its digest.

        Raises:
            UserError: naming what was changed.
        """
        for tokens in self.sources.values():
            if tokens.corpus is not None:
                verify_token_corpus(tokens.corpus)


def open_training_data(recipe: Recipe, may_write: bool = True, chats: Path | None = None) -> TrainingData:
    """Opens and checks all that a recipe draws from.

    Args:
        recipe: as resolved.
        may_write: packings that were computed are kept beside their shards.
        chats: the folder that `data.chats` became; needed where the recipe has them.

    Raises:
        UserError: a source is missing or empty, does not fit the model or the others, or would be shown too often.
    """
    folders: dict[str, str | Path] = {name: name for name in recipe.data.all_shards}
    if recipe.data.chats is not None:
        assert chats is not None, "whoever opens conversations has tokenized them"
        folders[CHATS] = chats
    sources = {name: open_tokens(folder, recipe.model.vocab_size) for name, folder in folders.items()}
    measured = open_tokens(recipe.data.held_out, recipe.model.vocab_size) if recipe.data.held_out is not None else None
    for tokens in (*sources.values(), *([] if measured is None else [measured])):
        _refuse_other_vocabulary(tokens, recipe)
        refuse_pairs_as_text(tokens, recipe)
    _refuse_unlike(list(sources.values()) + ([] if measured is None else [measured]))
    order = build_order(recipe, sources, may_write)
    refuse_too_many_epochs(recipe, order)
    digests = [tokens.digest for tokens in sources.values()]
    together = hashlib.sha256("".join(digests).encode()).hexdigest()
    files = [tokens.tokenizer_file for tokens in sources.values() if tokens.tokenizer_file is not None]
    return TrainingData(
        sources=sources,
        order=order,
        held_out=_held_out_batches(recipe, next(iter(sources.values())), measured),
        tokenizer_file=files[0] if files else None,
        digest=digests[0] if len(digests) == 1 else together,
    )


def build_order(recipe: Recipe, sources: dict[str, Tokens], may_write: bool) -> TrainingOrder:
    """The order of rows that the data section describes.

    Raises:
        UserError: a source holds no training tokens.
    """
    known: dict[tuple[str, int], AnyWindows] = {}
    stages = []
    for stage in recipe.stages:
        drawn = []
        for source in stage.sources:
            key = source.shards, stage.row_tokens
            if key not in known:
                known[key] = _windows_of(recipe, sources[source.shards], stage.row_tokens, may_write)
            if not known[key].num_windows:
                raise UserError(f"{source.shards} holds no training tokens", "tokenize more text")
            drawn.append(Source(source.shards, known[key], source.weight or source.tokens or 1))
        stages.append(OrderStage(stage.first_draw, stage.rows_per_step, drawn))
    return TrainingOrder(stages, recipe.data.seed)


def refuse_too_many_epochs(recipe: Recipe, order: TrainingOrder) -> None:
    """
    Raises:
        UserError: a source would be shown more often than its max_epochs, with what would do.
    """
    capped = [
        (f"{stage.place}.{index}", source)
        for stage in recipe.stages
        for index, source in enumerate(stage.sources)
        if source.max_epochs is not None
    ]
    rows = order.rows_until(recipe.total_steps)
    for place, source in capped:
        epochs = order.drawn_until(recipe.total_steps)[source.shards]
        exact = sum(
            Fraction(count, order.windows_of(name, row_tokens).num_windows)
            for (name, row_tokens), count in rows.items()
            if name == source.shards
        )
        if exact > Fraction(str(source.max_epochs)):
            shown = f"{place} ({source.shards}) would be shown {epochs:.2f} times over"
            raise UserError(f"{shown}, max_epochs is {source.max_epochs:g}", _what_would_do(recipe, source, epochs))


def _what_would_do(recipe: Recipe, source: SourceSection, epochs: float) -> str:
    assert source.max_epochs is not None
    fraction = source.max_epochs / epochs
    tokens = math.floor(recipe.total_steps * fraction) * recipe.tokens_per_step
    weight = _lower_weight(recipe, source, fraction)
    share = f"lower its weight (about {weight:.3g}), " if weight else ""
    return f"{share}train on at most {tokens:,} tokens, or raise max_epochs"


def _lower_weight(recipe: Recipe, source: SourceSection, fraction: float) -> float:
    """The weight whose share is `fraction` of the present one, the others as they are; 0 where there are none."""
    stage = next(stage for stage in recipe.stages if source in stage.sources)
    others = sum(other.weight or 0.0 for other in stage.sources if other is not source)
    share = fraction * (source.weight or 0.0) / (others + (source.weight or 0.0))
    return others * share / (1 - share)


def _windows_of(recipe: Recipe, tokens: Tokens, row_tokens: int, may_write: bool) -> AnyWindows:
    if recipe.preferences is not None:
        return PairRows(tokens.train, row_tokens)
    if tokens.train.counted is not None:
        refuse_longer_chats(tokens, row_tokens)
    if recipe.trains_state:
        return DocumentRows(tokens.train, row_tokens)
    if recipe.data.carry_state:
        return DocumentStreams(tokens.train, row_tokens, recipe.rows_per_step, recipe.data.seed)
    if tokens.train.counted is None and recipe.data.packing != "best_fit":
        return Windows(tokens.train, row_tokens)
    if tokens.train.counted is not None and recipe.data.packing == "windows":
        raise UserError(
            f"data.packing: windows would cut the conversations of {tokens.where} anywhere",
            "--set data.packing=auto packs conversations and leaves text as it is",
        )
    return open_packing(tokens.train, row_tokens, tokens.digest, may_write)


def refuse_pairs_as_text(tokens: Tokens, recipe: Recipe) -> None:
    """
    Raises:
        UserError: the tokens are preference pairs, and the recipe does not learn from such.
    """
    if tokens.holds_pairs and recipe.preferences is None:
        raise UserError(
            f"{tokens.where} holds preference pairs: half of its answers are those that were rejected",
            "name their files in data.chats.files with data.chats.format: preference, and `preferences`",
        )


def refuse_longer_chats(tokens: Tokens, row_tokens: int) -> None:
    """
    Raises:
        UserError: a conversation is longer than a row: its end would be read without its beginning.
    """
    for shard in tokens.shards.values():
        longest = int(shard.document_lengths.max(initial=0))
        if longest > row_tokens + 1:
            raise UserError(
                f"{tokens.where} holds conversations of up to {longest:,} tokens, and a row shows {row_tokens + 1:,}",
                f"--set data.row_tokens={longest - 1}, or tokenize them again for shorter rows",
            )


def _held_out_batches(recipe: Recipe, first: Tokens, measured: Tokens | None) -> HeldOutBatches | None:
    """Those of `data.held_out`, where a pair without a held-out part is measured whole; else the first source's."""
    tokens = measured or first
    shard, known = tokens.held_out, tokens.held_out_bytes
    if shard is None and measured is not None:
        shard, known = tokens.train, tokens.train_bytes
    if shard is None:
        return None
    if shard.counted is not None:
        refuse_longer_chats(tokens, recipe.data.longest_row_tokens)
    batches = HeldOutBatches(
        shard,
        known,
        recipe.data.longest_row_tokens,
        recipe.evaluation.max_tokens,
        recipe.trains_state,
        pairs=recipe.preferences is not None,
    )
    return batches if batches.num_targets else None


def _refuse_other_vocabulary(tokens: Tokens, recipe: Recipe) -> None:
    if tokens.vocab_size is not None and tokens.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"{tokens.where} was tokenized with {tokens.vocab_size:,} token ids but model.vocab_size is "
            f"{recipe.model.vocab_size:,}",
            f"--set model.vocab_size={tokens.vocab_size}, or tokenize with the tokenizer the recipe means",
        )


def _refuse_unlike(all_tokens: list[Tokens]) -> None:
    """
    Raises:
        UserError: two of them were made by different tokenizers, as far as that is known.
    """
    known = [tokens for tokens in all_tokens if tokens.tokenizer_file is not None]
    for tokens in known[1:]:
        one, other = known[0].tokenizer_file, tokens.tokenizer_file
        if one is not None and other is not None and not encode_alike(one, other):
            raise UserError(
                f"{tokens.where} was tokenized with another tokenizer than {known[0].where}",
                f"tokenize its text again with --tokenizer {one}",
            )
    ends = {tokens.train.end_id: tokens.where for tokens in all_tokens if tokens.train.end_id is not None}
    if len(ends) > 1:
        shown = ", ".join(f"{where} in id {end_id}" for end_id, where in ends.items())
        raise UserError(f"the documents of the sources end in different tokens: {shown}", "tokenize them alike")
