"""Tokens that the weights have not seen: rows of the embedding and the head for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mambatrain.chats.open_chats import chat_tokenizer
from mambatrain.data.open_tokens import open_tokens
from mambatrain.data.tokenizer import load_tokenizer, tokens_behind, with_special_tokens
from mambatrain.errors import UserError
from mambatrain.recipe import Recipe
from mambatrain.runs.weights import Weights

_VOCABULARY_TENSORS = ("embedding.weight", "lm_head.weight")


def fit_vocabulary(recipe: Recipe, weights: Weights | None) -> tuple[Recipe, Weights | None]:
    """Recipe and weights with room for the tokens that the recipe's data have behind those of the weights' tokenizer.

    Rows that only padded the vocabulary are used first. Each new row begins as the mean of the rows of the tokens that
    the weights know; a tied head stays tied.

    Raises:
        UserError: a tokenizer cannot be read, or an adapter would have to hold the new rows.
    """
    if weights is None:
        return recipe, None
    known, needed = _vocabulary_sizes(recipe, weights)
    if needed <= known:
        return recipe, weights
    if recipe.adapter is not None:
        raise UserError(
            f"the data have {needed - known} tokens that the weights do not know; an adapter cannot hold their rows",
            "finetune without an adapter, or use a template that needs no new tokens (data.chats.template: plain)",
        )
    section = recipe.model.model_copy(update={"vocab_size": max(recipe.model.vocab_size, needed)})
    tensors = {
        name: grow_rows(tensor, section.padded_vocab_size, known, needed) if name in _VOCABULARY_TENSORS else tensor
        for name, tensor in weights.tensors.items()
    }
    return recipe.model_copy(update={"model": section}), replace(weights, section=section, tensors=tensors)


def grow_rows(matrix: Tensor, num_rows: int, known: int, needed: int) -> Tensor:
    """(V, d) -> (num_rows, d): the rows from `known` to `needed`, and those behind the last, are the mean of the first.

    Args:
        matrix: embedding or head.
        num_rows: of the result, padding included.
        known: rows of tokens that the weights know.
        needed: rows of tokens in all.
    """
    grown = matrix.new_empty(num_rows, matrix.shape[1])
    grown[: len(matrix)] = matrix
    mean = matrix[:known].double().mean(dim=0).to(matrix.dtype)
    grown[known:needed] = mean
    grown[len(matrix) :] = mean
    return grown


def _vocabulary_sizes(recipe: Recipe, weights: Weights) -> tuple[int, int]:
    """Token ids that the weights' tokenizer has, and those that the tokenizer of the data has; (0, 0): not known."""
    own = weights.tokenizer_file
    if recipe.data.chats is not None:
        loaded = chat_tokenizer(recipe.data.chats.model_copy(update={"new_tokens": []}), own)
        return loaded.vocab_size, with_special_tokens(loaded, recipe.data.chats.new_tokens).vocab_size
    if own is None:
        return 0, 0
    files = [open_tokens(name).tokenizer_file for name in recipe.data.all_shards]
    theirs: Path | None = next((file for file in files if file is not None), None)
    behind = [] if theirs is None else tokens_behind(own, theirs)
    if not behind:  # none, or another tokenizer: that is refused where the data are opened
        return 0, 0
    known = load_tokenizer(own).vocab_size
    return known, known + len(behind)
