"""From a recipe's data section to rows: sources compared with each other, caps, held-out text."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambatrain.data.batches import Windows
from mambatrain.data.manifest import TokenizeOptions
from mambatrain.data.open_tokens import open_tokens
from mambatrain.data.packing import PackedWindows
from mambatrain.data.token_shards import TokenShardWriter
from mambatrain.data.tokenize_corpus import tokenize_corpus
from mambatrain.data.training_data import open_training_data
from mambatrain.errors import UserError
from mambatrain.recipe import Recipe, parse_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Path) -> Path:
    """Tokens `a` (large) and `b` (small) of one tokenizer, and a bare pair `c_text` of its ids."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, count in (("a", 300), ("b", 40)):
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": f"{name} number {n * n}"}) + "\n" for n in range(count)))
        tokenize_corpus([source], byte_tokenizer, folder / name, TokenizeOptions(held_out=0.1))
    a = open_tokens(folder / "a").train
    with TokenShardWriter(folder / "c_text", a.dtype) as writer:
        for index in range(1, 30):
            writer.append(a.document(index))
    return folder


def recipe_of(folder: Path, data: dict[str, Any], **training: Any) -> Recipe:
    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(one) for one in value]
        if isinstance(value, dict):
            return {k: str(folder / v) if k in ("shards", "held_out") else placed(v) for k, v in value.items()}
        return value

    content = {
        "model": {"d_model": 8, "num_layers": 1, "vocab_size": 320},
        "data": {"row_tokens": 16, **placed(data)},
        "training": {"tokens_per_step": 64, "total_steps": 10, **training},
        "optimizer": {"learning_rate": 0.1},
    }
    return parse_recipe(content, "r.yaml")


AB = [{"shards": "a", "weight": 3}, {"shards": "b", "weight": 1}]


def test_one_folder(folder: Path) -> None:
    data = open_training_data(recipe_of(folder, {"shards": "a"}))
    tokens = open_tokens(folder / "a")
    assert data.digest == tokens.digest
    assert data.tokenizer_file == folder / "a" / "tokenizer.json"
    assert data.held_out is not None
    assert tokens.held_out_bytes is not None
    assert data.held_out.num_bytes == tokens.held_out_bytes.sum()
    assert isinstance(data.order.stages[0].sources[0].windows, Windows)
    data.verify()


def test_a_mixture_draws_from_all_and_measures_on_the_first(folder: Path) -> None:
    data = open_training_data(recipe_of(folder, {"sources": AB}))
    names = [str(folder / "a"), str(folder / "b")]
    assert data.order.rows_by_source(0) == dict(zip(names, (3, 1), strict=True))
    assert len({data.digest, *(tokens.digest for tokens in data.sources.values())}) == 3
    first = open_training_data(recipe_of(folder, {"shards": "a"})).held_out
    assert data.held_out is not None
    assert first is not None
    assert data.held_out.num_bytes == first.num_bytes
    other = open_training_data(recipe_of(folder, {"sources": AB, "held_out": "b"})).held_out
    assert other is not None
    assert other.num_bytes != first.num_bytes


def test_every_source_is_verified(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    data = open_training_data(recipe_of(tmp_path / "copy", {"sources": AB}))
    content = bytearray((tmp_path / "copy" / "b" / "train.bin").read_bytes())
    content[5] ^= 1
    (tmp_path / "copy" / "b" / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"b/train\.bin: not the bytes that were written"):
        data.verify()


def test_a_bare_pair_is_trained_on_as_it_is(folder: Path) -> None:
    data = open_training_data(recipe_of(folder, {"shards": "c_text"}))
    assert (data.held_out, data.tokenizer_file) == (None, None)
    batch = data.order.micro_batches(0, 4)[0]
    assert batch.boundaries.any()
    measured = open_training_data(recipe_of(folder, {"shards": "a", "held_out": "c_text"})).held_out
    assert measured is not None
    assert (measured.num_documents, measured.num_bytes) == (29, None)


def test_ids_of_a_bare_pair_must_fit_the_model(folder: Path, tmp_path: Path) -> None:
    with TokenShardWriter(tmp_path / "big", np.dtype("<i4")) as writer:
        for _ in range(50):
            writer.append(np.array([5, 320, 0]))
    data = open_training_data(recipe_of(tmp_path, {"shards": "big"}))
    with pytest.raises(UserError, match="has id 320, beyond the 320"):
        data.order.micro_batches(0, 4)


def test_packed_rows_are_kept_beside_the_shards(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    recipe = recipe_of(tmp_path / "copy", {"shards": "a", "packing": "best_fit"})
    data = open_training_data(recipe, may_write=False)
    assert isinstance(data.order.stages[0].sources[0].windows, PackedWindows)
    kept = tmp_path / "copy" / "a" / "train.best_fit-16.npy"
    assert not kept.exists()
    open_training_data(recipe)
    assert kept.is_file()
    open_tokens(tmp_path / "copy" / "a")  # a folder of tokens still
    options = TokenizeOptions(held_out=0.2)
    tokenizer = folder / "a" / "tokenizer.json"
    tokenize_corpus([folder / "a.jsonl"], tokenizer, tmp_path / "copy" / "a", options, overwrite=True)
    assert not kept.exists()


@pytest.mark.parametrize(("max_epochs", "refused"), [(1.0, True), (1.9, True), (2.5, False)])
def test_a_cap_that_cannot_be_met_is_refused_with_what_would_do(folder: Path, max_epochs: float, refused: bool) -> None:
    windows = Windows(open_tokens(folder / "b").train, 16).num_windows
    steps = 2 * windows  # at a quarter of 4 rows a step, two epochs
    sources = [AB[0], {**AB[1], "max_epochs": max_epochs}]
    recipe = recipe_of(folder, {"sources": sources}, total_steps=steps)
    if not refused:
        open_training_data(recipe)
        return
    with pytest.raises(UserError) as caught:
        open_training_data(recipe)
    expected = f"data.sources.1 ({folder / 'b'}) would be shown 2.00 times over, max_epochs is {max_epochs:g}"
    assert caught.value.message == expected
    hint = str(caught.value.hint)
    # Each of the two ways out is one.
    weight = float(re.search(r"about ([\d.e-]+)\)", hint)[1])
    open_training_data(
        recipe_of(folder, {"sources": [AB[0], {**sources[1], "weight": weight * 0.99}]}, total_steps=steps)
    )
    tokens = int(re.search(r"at most ([\d,]+) tokens", hint)[1].replace(",", ""))
    open_training_data(recipe_of(folder, {"sources": sources}, total_steps=tokens // 64))


def test_a_cap_counts_over_all_stages(folder: Path) -> None:
    windows = Windows(open_tokens(folder / "b").train, 16).num_windows
    half = 64 * windows  # one epoch of b at a quarter
    capped = {"shards": "b", "weight": 1, "max_epochs": 1.5}
    data = {"sources": [AB[0], capped], "stages": [{"from_tokens": half, "sources": [{**AB[0], "weight": 1}, capped]}]}
    with pytest.raises(UserError, match=r"data\.sources\.1 .* would be shown 3\.00 times over"):
        open_training_data(recipe_of(folder, data, total_steps=2 * windows))


def test_exactly_the_cap_is_met(folder: Path) -> None:
    windows = Windows(open_tokens(folder / "b").train, 16).num_windows
    sources = [AB[0], {**AB[1], "max_epochs": 2}]
    open_training_data(recipe_of(folder, {"sources": sources}, total_steps=2 * windows))
    with pytest.raises(UserError, match="times over"):
        open_training_data(recipe_of(folder, {"sources": sources}, total_steps=2 * windows + 1))


def test_sources_that_do_not_fit_are_refused(folder: Path, tiny_shards: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, {"shards": "a"})
    size = open_tokens(folder / "a").vocab_size
    assert size is not None
    small = recipe.model_copy(update={"model": recipe.model.model_copy(update={"vocab_size": size - 1})})
    with pytest.raises(UserError, match=rf"was tokenized with {size} token ids but model\.vocab_size is {size - 1}"):
        open_training_data(small)
    shutil.copytree(folder / "a", tmp_path / "a")
    shutil.copytree(tiny_shards, tmp_path / "b")
    with pytest.raises(UserError, match="was tokenized with another tokenizer than"):
        mixed = recipe_of(tmp_path, {"sources": AB})
        open_training_data(mixed.model_copy(update={"model": mixed.model.model_copy(update={"vocab_size": 512})}))
    with TokenShardWriter(tmp_path / "c", np.dtype("<u2")) as writer:
        for _ in range(3):
            writer.append(np.array([0, 7]))
    with pytest.raises(UserError, match=r"end in different tokens: .* in id 0, .* in id 7"):
        open_training_data(recipe_of(tmp_path, {"sources": [AB[0], {"shards": "c", "weight": 1}]}))
    with TokenShardWriter(tmp_path / "empty", np.dtype("<u2")) as writer:
        writer.append(np.array([0]))
    with pytest.raises(UserError, match="holds no training tokens"):
        open_training_data(recipe_of(tmp_path, {"shards": "empty"}))
