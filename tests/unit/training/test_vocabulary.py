"""New tokens: rows that padded the vocabulary first, then new ones, all of them the mean of the known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mambatrain.data.tokenizer import load_tokenizer, tokens_behind, with_special_tokens
from mambatrain.errors import UserError
from mambatrain.models.parameters import parameter_shapes
from mambatrain.recipe import ModelSection, Recipe, parse_recipe
from mambatrain.runs.weights import Weights
from mambatrain.training.vocabulary import fit_vocabulary, grow_rows


def weights_of(tokenizer: Path | None, vocab_size: int, tied: bool, multiple: int = 8) -> Weights:
    section = ModelSection(
        d_model=8, num_layers=1, vocab_size=vocab_size, pad_vocab_multiple=multiple, tie_embeddings=tied
    )
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(section).items()}
    return Weights(section, tensors, tokenizer, "a test", "0" * 64)


def recipe_of(weights: Weights, new_tokens: list[str], **more: object) -> Recipe:
    content = {
        "model": weights.section.model_dump(),
        "data": {"chats": {"files": ["x.jsonl"], "new_tokens": new_tokens, **more}, "row_tokens": 64},
        "training": {"rows_per_step": 2, "total_steps": 4},
        "optimizer": {"learning_rate": 1e-3},
    }
    return parse_recipe(content, "a test")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("padded", "multiple"), [(512, 8), (516, 1), (520, 8)], ids=["none", "four", "eight"])
def test_rows_are_used_or_added_and_begin_as_the_mean(
    tiny_shards: Path, tied: bool, padded: int, multiple: int
) -> None:
    weights = weights_of(tiny_shards / "tokenizer.json", padded, tied, multiple)  # the tokenizer has 512
    new = [f"<new{n}>" for n in range(6)]
    recipe, grown = fit_vocabulary(recipe_of(weights, new), weights)
    assert grown is not None and grown.digest == weights.digest
    assert recipe.model == grown.section
    assert recipe.model.vocab_size == max(padded, 518)
    assert recipe.model.padded_vocab_size == {512: 520, 516: 518, 520: 520}[padded]
    assert {name: tuple(value.shape) for name, value in grown.tensors.items()} == parameter_shapes(recipe.model)
    for name in ("embedding.weight", *(() if tied else ("lm_head.weight",))):
        before, after = weights.tensors[name], grown.tensors[name]
        mean = before[:512].double().mean(dim=0).float()
        assert torch.equal(after[:512], before[:512])
        assert torch.equal(after[512:518], mean.expand(6, -1))
        if padded == 520:
            assert torch.equal(after[518:], before[518:])  # padding that is left stays
    others = grown.tensors.keys() - {"embedding.weight", "lm_head.weight"}
    assert all(grown.tensors[name] is weights.tensors[name] for name in others)
    again, same = fit_vocabulary(recipe, grown)
    assert again.model == recipe.model and same is not None  # a second time changes no shape


def test_an_adapter_cannot_hold_new_rows(tiny_shards: Path) -> None:
    weights = weights_of(tiny_shards / "tokenizer.json", 512, True)
    content = recipe_of(weights, ["<new>"]).model_dump(mode="json") | {"adapter": {"kind": "lora"}}
    with pytest.raises(UserError, match="1 tokens that the weights do not know; an adapter cannot hold"):
        fit_vocabulary(parse_recipe(content, "a test"), weights)
    with pytest.raises(UserError, match=r"parameters .frozen, rates. is about training the weights"):
        parse_recipe(content | {"parameters": {"frozen": ["*.D"]}}, "a test")


def test_narrow_weights_keep_their_dtype() -> None:
    matrix = torch.randn(6, 4, dtype=torch.bfloat16)
    grown = grow_rows(matrix, 8, 6, 7)
    assert grown.dtype is torch.bfloat16
    assert torch.equal(grown[7], matrix.double().mean(dim=0).bfloat16())


def test_without_new_tokens_nothing_changes(tiny_shards: Path) -> None:
    weights = weights_of(tiny_shards / "tokenizer.json", 512, True)
    recipe = recipe_of(weights, [])
    assert fit_vocabulary(recipe, weights) == (recipe, weights)
    assert fit_vocabulary(recipe, None) == (recipe, None)


def test_a_tokenizer_that_goes_on_behind_another_is_told_from_another(tiny_shards: Path, tmp_path: Path) -> None:
    base = tiny_shards / "tokenizer.json"
    loaded = load_tokenizer(base)
    extended = with_special_tokens(loaded, ["<a>", "<|endoftext|>", "<b>"])
    assert (extended.vocab_size, with_special_tokens(extended, ["<a>"])) == (514, extended)
    (tmp_path / "extended.json").write_bytes(extended.content)
    assert tokens_behind(base, tmp_path / "extended.json") == ["<a>", "<b>"]
    assert tokens_behind(base, base) == []
    assert tokens_behind(tmp_path / "extended.json", base) is None  # ids that the other has not
    text = 'def f(x): return "<a>"'
    assert [ids.tolist() for ids in extended.encode_batch([text])] == [
        ids.tolist() for ids in loaded.encode_batch([text])
    ]
    with pytest.raises(UserError, match="does not exist"):
        tokens_behind(base, tmp_path / "nowhere.json")
