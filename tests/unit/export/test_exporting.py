"""Export: whole or not at all, compared before it is kept, not made twice, nothing replaced by accident."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mambatrain.errors import UserError
from mambatrain.export import exporting, transformers_folder
from mambatrain.export.exporting import Target, export_weights
from mambatrain.export.mamba_ssm_folder import MAMBA_SSM
from mambatrain.export.transformers_folder import TRANSFORMERS
from mambatrain.models.parameters import initial_value, parameter_rows
from mambatrain.recipe import ModelSection
from mambatrain.runs.weights import Weights, read_weights

END = "<|endoftext|>"


def write_tokenizer(file: Path, end: str = END) -> Path:
    """Bytes, and a token that ends a document, with the highest id: 0 would hide a mistake."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([end])
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))
    return file


def make_weights(folder: Path, block: str = "mamba1", end: str = END, **changes: Any) -> Weights:
    sizes: dict[str, Any] = {"d_model": 16, "num_layers": 2, "vocab_size": 257, "d_state": 4}
    sizes |= {"head_dim": 8, "num_groups": 2} if block == "mamba2" else {}
    section = ModelSection.model_validate({"block": block, **sizes, **changes})
    tensors = {name: initial_value(name, section, 0) for name in parameter_rows(section)}
    return Weights(section, tensors, write_tokenizer(folder / "tokenizer.json", end), "nowhere", "0" * 64)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_transformers_opens_generates_and_tokenizes(block: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = make_weights(tmp_path / "from", block)
    done = export_weights(weights, tmp_path / "out", TRANSFORMERS)
    assert (done.folder, done.reused) == (tmp_path / "out", False)
    assert done.reader.startswith("transformers 5.")
    assert 0 < done.largest_difference < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    text = "def f(x):\n    return 'é'"
    ids = tokenizer(tokenizer.bos_token + text)["input_ids"]
    assert ids[0] == tokenizer.eos_token_id == tokenizer.pad_token_id == 256
    assert tokenizer.decode(ids[1:]) == text
    model = AutoModelForCausalLM.from_pretrained(done.folder)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == weights.section.padded_vocab_size == 264
    assert model.generation_config.eos_token_id == 256
    generated = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated.shape == (1, len(ids) + 3)
    mode = (done.folder / "config.json").stat().st_mode
    assert all(path.stat().st_mode == mode for path in done.folder.iterdir())


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_folder, "MAX_SHARD_SIZE", "12KB")
    weights = make_weights(tmp_path / "from")
    done = export_weights(weights, tmp_path / "out", TRANSFORMERS)
    shards = list(done.folder.glob("model-*-of-*.safetensors"))
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    again = read_weights(str(done.folder))
    assert all(torch.equal(again.tensors[name], weights.tensors[name]) for name in weights.tensors)


@pytest.mark.parametrize("target", [TRANSFORMERS, MAMBA_SSM], ids=lambda target: target.name)
@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_bf16_keeps_in_fp32_what_the_table_keeps(block: str, target: Target, tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "from", block)
    done = export_weights(weights, tmp_path / "out", target, dtype=torch.bfloat16)
    stored = read_weights(str(done.folder)).tensors
    for name, row in parameter_rows(weights.section).items():
        dtype = torch.float32 if row.keeps_fp32 else torch.bfloat16
        assert torch.equal(stored[name], weights.tensors[name].to(dtype)), name
    if target is TRANSFORMERS:
        assert json.loads((done.folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_fp64_weights_are_stored_in_fp32(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "from")
    double = replace(weights, tensors={name: tensor.double() for name, tensor in weights.tensors.items()})
    export_weights(double, tmp_path / "out", TRANSFORMERS)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def spoiling(target: Target, name: str) -> Target:
    """A target that writes one number of one tensor a little wrong."""

    def write(folder: Path, weights: Weights, tokenizer: Any) -> None:
        tensors = {**weights.tensors, name: weights.tensors[name].clone()}
        tensors[name].view(-1)[-1] += 1e-6
        target.write(folder, replace(weights, tensors=tensors), tokenizer)

    return replace(target, write=write)


def miswriting(target: Target, **changes: Any) -> Target:
    """A target that writes the right tensors and a wrong configuration."""

    def write(folder: Path, weights: Weights, tokenizer: Any) -> None:
        target.write(folder, weights, tokenizer)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return replace(target, write=write)


@pytest.mark.parametrize("target", [TRANSFORMERS, MAMBA_SSM], ids=lambda target: target.name)
def test_an_export_with_a_wrong_tensor_is_not_kept(target: Target, tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "from")
    for name in parameter_rows(weights.section):
        if ".1." in name:
            continue
        with pytest.raises(UserError, match=f"the export was not kept: {name} was not read back"):
            export_weights(weights, tmp_path / "out", spoiling(target, name))
        assert [path.name for path in tmp_path.iterdir()] == ["from"], name


@pytest.mark.parametrize("change", [{"layer_norm_epsilon": 1e-3}, {"rescale_prenorm_residual": True}])
def test_an_export_whose_logits_differ_is_not_kept(change: dict[str, Any], tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "from")
    with pytest.raises(UserError, match=r"the export was not kept: transformers .* differ from ours by"):
        export_weights(weights, tmp_path / "out", miswriting(TRANSFORMERS, **change))
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_nan_weights_are_not_called_equal(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "from")
    weights.tensors["norm_f.weight"][3] = torch.nan
    with pytest.raises(UserError, match="differ from ours by nan"):
        export_weights(weights, tmp_path / "out", MAMBA_SSM)


def test_a_tokenizer_that_is_read_otherwise_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = make_weights(tmp_path / "from")

    def write_another(tokenizer: Any, folder: Path) -> None:
        original(tokenizer, folder)
        changed = json.loads((folder / "tokenizer.json").read_text())
        changed["pre_tokenizer"]["add_prefix_space"] = True
        (folder / "tokenizer.json").write_text(json.dumps(changed))

    original = exporting.write_tokenizer
    monkeypatch.setattr(exporting, "write_tokenizer", write_another)
    with pytest.raises(UserError, match="encodes text otherwise"):
        export_weights(weights, tmp_path / "out", TRANSFORMERS)
    assert not (tmp_path / "out").exists()


def test_a_finished_export_is_not_made_again(tmp_path: Path) -> None:
    weights, out = make_weights(tmp_path / "from"), tmp_path / "out"
    first = export_weights(weights, out, MAMBA_SSM)
    (out / "README.md").write_text("my own words")
    before = everything_in(out)
    second = export_weights(weights, out, MAMBA_SSM)
    assert second == replace(first, reused=True)
    assert everything_in(out) == before
    for other in (replace(weights, digest="1" * 64), make_weights(tmp_path / "other", end="<eos>")):
        with pytest.raises(UserError, match="exists and was made of something else"):
            export_weights(other, out, MAMBA_SSM)
    with pytest.raises(UserError, match="something else"):
        export_weights(weights, out, MAMBA_SSM, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="something else"):
        export_weights(weights, out, TRANSFORMERS)
    assert everything_in(out) == before
    export_weights(weights, out, TRANSFORMERS, overwrite=True)
    assert not (out / "pytorch_model.bin").exists()
    assert (out / "model.safetensors").exists()


def test_a_damaged_export_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    weights, out = make_weights(tmp_path / "from"), tmp_path / "out"
    export_weights(weights, out, MAMBA_SSM)
    content = bytearray((out / "pytorch_model.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match="exists"):
        export_weights(weights, out, MAMBA_SSM)


def test_only_folders_of_weights_are_replaced(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "from")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError):
            export_weights(weights, tmp_path / "thesis", MAMBA_SSM, overwrite=overwrite)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        export_weights(weights, tmp_path / "file", MAMBA_SSM, overwrite=True)
    (tmp_path / "empty").mkdir()
    assert not export_weights(weights, tmp_path / "empty", MAMBA_SSM).reused


def test_a_failed_overwrite_leaves_the_old_folder(tmp_path: Path) -> None:
    weights, out = make_weights(tmp_path / "from"), tmp_path / "out"
    export_weights(weights, out, MAMBA_SSM)
    before = everything_in(out)
    wrong = spoiling(MAMBA_SSM, "embedding.weight")
    with pytest.raises(UserError, match="not kept"):
        export_weights(replace(weights, digest="1" * 64), out, wrong, overwrite=True)
    assert everything_in(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"from", "out"}


def test_the_end_token_is_the_folders_own_the_usual_or_the_one_named(tmp_path: Path) -> None:
    usual = make_weights(tmp_path / "usual", end="</s>")
    export_weights(usual, tmp_path / "out", TRANSFORMERS)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    odd = make_weights(tmp_path / "odd", end="[STOP]")
    with pytest.raises(UserError, match="no token that ends a document"):
        export_weights(odd, tmp_path / "odd-out", TRANSFORMERS)
    export_weights(odd, tmp_path / "odd-out", TRANSFORMERS, end_of_document="[STOP]")
    again = read_weights(str(tmp_path / "odd-out"))  # its tokenizer_config.json says what ends a text
    export_weights(again, tmp_path / "third", TRANSFORMERS)
    assert json.loads((tmp_path / "third" / "config.json").read_text())["eos_token_id"] == 256


def test_weights_without_a_tokenizer_are_exported_without_one(tmp_path: Path) -> None:
    weights = replace(make_weights(tmp_path / "from"), tokenizer_file=None)
    done = export_weights(weights, tmp_path / "out", TRANSFORMERS)
    assert not list(done.folder.glob("tokenizer*"))
    assert json.loads((done.folder / "generation_config.json").read_text()) == {}
    with pytest.raises(UserError, match="says nothing"):
        export_weights(weights, tmp_path / "other", TRANSFORMERS, end_of_document=END)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "from", vocab_size=200)
    with pytest.raises(UserError, match="257 tokens, the model 200"):
        export_weights(weights, tmp_path / "out", TRANSFORMERS)


def test_what_mamba_ssm_cannot_say_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "from", norm_eps=1e-3)
    with pytest.raises(UserError, match=r"norm_eps = 0\.001"):
        export_weights(weights, tmp_path / "out", MAMBA_SSM)
    assert [path.name for path in tmp_path.iterdir()] == ["from"]
    shutil.rmtree(tmp_path / "from")
