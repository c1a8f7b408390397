"""A fine-tuning on conversations is the same from a run and from what other tools have of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mambatrain.export.exporting import export_weights
from mambatrain.export.mamba_ssm_folder import MAMBA_SSM
from mambatrain.export.transformers_folder import TRANSFORMERS
from mambatrain.recipe import read_recipe
from mambatrain.runs.folder import read_log
from mambatrain.runs.weights import read_weights
from mambatrain.training.assemble import Where
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

Write = Callable[..., Path]
WORDS = ["alpha", "beta", "gamma", "delta"]
# 8 of them: a transformers folder does not say to what the vocabulary was padded, and a softmax has the padding in it.
NEW = ["<|im_start|>", "<|im_end|>", *(f"<|spare-{n}|>" for n in range(6))]
ROWS = [
    {"messages": [{"role": "user", "content": f"say {a}"}, {"role": "assistant", "content": f"{b} {a}"}]}
    for a in WORDS
    for b in WORDS
]


def losses(recipe: Path, run: Path, start: Path | None) -> list[float]:
    weights = None if start is None else read_weights(str(start))
    read = read_recipe(str(recipe), model=None if weights is None else weights.section)
    where = Where(device="cpu", kernels="auto", quiet=True)
    assert run_training(read, run, where, "if-possible", StopRequest(), weights) == 0
    return [line["loss"] for line in read_log(run / "log.jsonl") if line["event"] == "step"]


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_folders_of_other_tools_start_a_run_as_their_origin_does(
    block: str, write_tiny_recipe: Write, tmp_path: Path
) -> None:
    """Each with its own tokenizer beside it, and rows for the new tokens of ChatML."""
    own = {"model__head_dim": 16} if block == "mamba2" else {}
    losses(write_tiny_recipe(model__block=block, **own, training__total_steps=3), tmp_path / "base", None)
    weights = read_weights(str(tmp_path / "base"))
    export_weights(weights, tmp_path / "transformers", TRANSFORMERS)
    export_weights(weights, tmp_path / "mamba_ssm", MAMBA_SSM)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    chats = {"files": [str(tmp_path / "chats.jsonl")], "template": "chatml", "new_tokens": NEW}
    recipe = write_tiny_recipe(
        model=None, data__shards=None, data__chats=chats, data__row_tokens=64, training__total_steps=4
    )
    names = ("base", "transformers", "mamba_ssm")
    found = {name: losses(recipe, tmp_path / f"from-{name}", tmp_path / name) for name in names}
    assert len(found["base"]) == 4 and len(set(found["base"])) == 4
    assert found["transformers"] == found["mamba_ssm"] == found["base"]
    grown = [read_weights(str(tmp_path / f"from-{name}")) for name in found]
    assert {one.section.vocab_size for one in grown} == {520}
    assert len({(one.tokenizer_file or Path()).read_text() for one in grown}) == 1
