"""Weights wherever they lie, and a clear sentence for everything that is not weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mambatrain.errors import UserError
from mambatrain.files import sha256_of
from mambatrain.models.parameters import parameter_rows
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection, parse_recipe, write_recipe
from mambatrain.runs.checkpoint import Progress, save_checkpoint
from mambatrain.runs.checkpoint_tensors import MODEL_FILE
from mambatrain.runs.weights import load_model, read_weights

CPU = torch.device("cpu")
SECTION = ModelSection(d_model=8, num_layers=2, vocab_size=13, d_state=4)
CONFIG: dict[str, Any] = {
    "model_type": "mamba",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "state_size": 4,
}


def random_tensors(seed: int = 0, section: ModelSection = SECTION) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(row.shape(section), generator=generator) for name, row in parameter_rows(section).items()}


def write_run(run: Path, steps: tuple[int, ...] = (100,)) -> Path:
    """A run folder as training leaves it; the checkpoint of step n holds random_tensors(n)."""
    run.mkdir(exist_ok=True)
    content = {
        "model": SECTION.model_dump(),
        "data": {"shards": "s", "row_tokens": 8},
        "training": {"rows_per_step": 1, "total_steps": 200},
        "optimizer": {"learning_rate": 0.1},
    }
    (run / "recipe.yaml").write_text(write_recipe(parse_recipe(content, "test")))
    (run / "tokenizer.json").write_text("{}")
    for step in steps:
        save_checkpoint(run / "checkpoints", Progress(step=step), random_tensors(step), {"x.step": torch.zeros(1)})
    return run


def theirs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "backbone.embeddings.weight" if name == "embedding.weight" else f"backbone.{name}": tensor
        for name, tensor in tensors.items()
    }


def write_transformers_folder(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def assert_holds(where: Path, seed: int) -> None:
    weights = read_weights(str(where))
    expected = random_tensors(seed)
    assert weights.tensors.keys() == expected.keys()
    assert all(torch.equal(weights.tensors[name], expected[name]) for name in expected)


def test_a_run_gives_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=(100, 150))
    weights = read_weights(str(run))
    assert weights.section == SECTION
    assert weights.tokenizer_file == run / "tokenizer.json"
    assert weights.origin.endswith("step-00000150")
    assert weights.digest == sha256_of(run / "checkpoints" / "step-00000150" / MODEL_FILE)
    assert_holds(run, 150)
    newest = run / "checkpoints" / "step-00000150" / MODEL_FILE
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert weights.damaged == ()
    assert_holds(run, 100)
    assert read_weights(str(run)).damaged == (f"{newest} was changed: its digest is not the manifest's",)


def test_a_checkpoint_can_be_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=(100, 150))
    assert_holds(run / "checkpoints" / "step-00000100", 100)
    (run / "checkpoints" / "step-00000150" / MODEL_FILE).write_bytes(b"short")
    with pytest.raises(UserError, match=r"step-00000150 cannot be used: .*model\.safetensors has 5 bytes"):
        read_weights(str(run / "checkpoints" / "step-00000150"))


def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=())
    with pytest.raises(UserError, match="stopped before its first checkpoint"):
        read_weights(str(run))
    write_run(run, steps=(100,))
    (run / "checkpoints" / "step-00000100" / MODEL_FILE).unlink()
    with pytest.raises(UserError, match=r"no whole checkpoint: .*model\.safetensors is missing"):
        read_weights(str(run))


def test_the_model_is_made_of_its_own_tensors_in_the_dtype_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    backend = choose_backend("torch", CPU)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model, weights = load_model(str(run), backend, CPU, dtype)
        for name, row in parameter_rows(SECTION).items():
            parameter = model.get_parameter(name)
            expected = torch.float32 if row.keeps_fp32 and dtype == torch.bfloat16 else dtype
            assert (parameter.dtype, parameter.requires_grad) == (expected, True)
            assert torch.equal(parameter, weights.tensors[name].to(expected))
        with torch.no_grad():
            model.embedding.weight.zero_()
        assert weights.tensors["embedding.weight"].abs().sum() > 0
        assert model(torch.arange(5)[None])[0].isfinite().all()


@pytest.mark.parametrize("container", ["safetensors", "sharded safetensors", "pickle", "old pickle", "sharded pickle"])
def test_every_container_of_a_transformers_folder(container: str, tmp_path: Path) -> None:
    tensors = theirs(random_tensors(7))
    folder = write_transformers_folder(tmp_path / "folder", tensors)
    whole = folder / "model.safetensors"
    halves = [dict(list(tensors.items())[:5]), dict(list(tensors.items())[5:])]
    if container != "safetensors":
        whole.unlink()
    if container == "sharded safetensors":
        for index, half in enumerate(halves):
            save_file(half, folder / f"model-{index}.safetensors")
        index_of = {name: f"model-{index}.safetensors" for index, half in enumerate(halves) for name in half}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index_of}))
    if container == "sharded pickle":
        for index, half in enumerate(halves):
            torch.save(half, folder / f"pytorch_model-{index}.bin")
        index_of = {name: f"pytorch_model-{index}.bin" for index, half in enumerate(halves) for name in half}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index_of}))
    if "pickle" in container and "sharded" not in container:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization="old" not in container)
    assert_holds(folder, 7)
    if container == "sharded safetensors":
        (folder / "model-1.safetensors").unlink()
        with pytest.raises(UserError, match=r"names a shard that is not in the folder: model-1\.safetensors"):
            read_weights(str(folder))


def test_the_digest_follows_the_tensors(tmp_path: Path) -> None:
    one = read_weights(str(write_transformers_folder(tmp_path / "one", theirs(random_tensors(1)))))
    same = read_weights(str(write_transformers_folder(tmp_path / "same", theirs(random_tensors(1)))))
    other = read_weights(str(write_transformers_folder(tmp_path / "other", theirs(random_tensors(2)))))
    assert one.digest == same.digest != other.digest


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = write_transformers_folder(tmp_path / "folder", theirs(random_tensors()))
    (folder / "model.safetensors").unlink()
    trace = tmp_path / "it-ran"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    file = folder / "pytorch_model.bin"
    for new in (True, False):
        torch.save({"weight": Attack()}, file, _use_new_zipfile_serialization=new)
        with pytest.raises(UserError, match=r"pytorch_model\.bin was refused: it asks to run posix\.mkdir") as refusal:
            read_weights(str(folder))
        assert not trace.exists()
        assert "weights_only" not in refusal.value.message
    for garbage in (b"", b"\x80\x02garbage", b"PK\x03\x04garbage"):
        file.write_bytes(garbage)
        with pytest.raises(UserError, match=r"pytorch_model\.bin was refused"):
            read_weights(str(folder))
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="something else than tensors"):
        read_weights(str(folder))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def refusal_of(tensors: dict[str, Tensor], **changes: Any) -> str:
        folder = write_transformers_folder(tmp_path / "folder", tensors, **changes)
        with pytest.raises(UserError) as refusal:
            read_weights(str(folder))
        return refusal.value.message

    whole = theirs(random_tensors())
    missing = {name: tensor for name, tensor in whole.items() if "layers.1.mixer.D" not in name}
    assert "lacks tensors of the model it describes: backbone.layers.1.mixer.D" in refusal_of(missing)
    extra = {**whole, "backbone.layers.1.mixer.gate.weight": torch.zeros(2)}
    assert "does not have: backbone.layers.1.mixer.gate.weight" in refusal_of(extra)
    assert "does not have: vision.weight" in refusal_of({**whole, "vision.weight": torch.zeros(2)})
    wrong = {**whole, "backbone.norm_f.weight": torch.zeros(9)}
    assert "backbone.norm_f.weight has shape (9,), the model's is (8,)" in refusal_of(wrong)
    untied = {**whole, "lm_head.weight": torch.zeros(16, 8)}
    assert "lm_head.weight differs" in refusal_of(untied)
    assert_holds(
        write_transformers_folder(
            tmp_path / "tied", {**whole, "lm_head.weight": whole["backbone.embeddings.weight"].clone()}
        ),
        0,
    )
    assert "lacks tensors of the model it describes: lm_head.weight" in refusal_of(whole, tie_word_embeddings=False)


def test_what_is_no_folder_of_weights_is_refused(tmp_path: Path) -> None:
    def refusal_of(where: str | Path) -> UserError:
        with pytest.raises(UserError) as refusal:
            read_weights(str(where))
        return refusal.value

    assert "there is no folder" in refusal_of(tmp_path / "nothing").message
    assert "a transformers folder" in (refusal_of(tmp_path / "nothing").hint or "")
    (tmp_path / "file.bin").write_text("x")
    assert "is a file" in refusal_of(tmp_path / "file.bin").message
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "neither recipe.yaml nor config.json" in refusal_of(folder).message
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "model_type = 'llama'" in refusal_of(folder).message
    (folder / "config.json").write_text("{")
    assert "is not readable JSON" in refusal_of(folder).message
    (folder / "config.json").write_text("[]")
    assert "holds no JSON object" in refusal_of(folder).message
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert "holds no tensors" in refusal_of(folder).message
    (folder / "model.safetensors").write_bytes(b"\x00" * 20)
    assert "not a whole safetensors file" in refusal_of(folder).message


def test_a_hub_name_without_network_gets_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="org/name is no folder here, and it could not be fetched") as refusal:
        read_weights("org/name")
    assert "name a folder" in (refusal.value.hint or "")
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="there is no folder runs/name"):  # a slip of the pen, not a hub name
        read_weights("runs/name")


def test_a_hub_name_is_read_from_what_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = write_transformers_folder(tmp_path / "snapshot", theirs(random_tensors(9)))
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert_holds(Path("org/name"), 9)
    assert len(asked) == 1
    (folder / "model.safetensors").rename(tmp_path / "away")
    torch.save(theirs(random_tensors(9)), folder / "pytorch_model.bin")
    assert_holds(Path("org/name"), 9)  # the pickle is fetched only where there is nothing safer
    assert [any("bin" in pattern for pattern in patterns) for _, patterns in asked] == [False, False, True]
