"""Adapters in the training loop: the base stays, what is trained learns, what does not fit is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import PROJECTIONS, TUNABLE
from safetensors.torch import load_file

from mambatrain.adapters.open_weights import open_weights
from mambatrain.data.training_data import open_training_data
from mambatrain.errors import UserError
from mambatrain.evaluation.held_out import measure_held_out
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import parse_recipe, read_recipe
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.runs.folder import read_log
from mambatrain.runs.state_file import read_state_file
from mambatrain.runs.weights import build_model, read_weights
from mambatrain.training.assemble import Where
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

Write = Callable[..., Path]
CPU = torch.device("cpu")
SIZES: dict[str, dict[str, Any]] = {
    "mamba1": {"model__dt_rank": 4},
    "mamba2": {"model__block": "mamba2", "model__head_dim": 16},
}


def train(recipe: Path, run: Path, weights: Path | str | None = None, kernels: str = "torch") -> list[dict[str, Any]]:
    start = None if weights is None else open_weights(str(weights))
    read = read_recipe(str(recipe), model=None if start is None else start.section)
    where = Where(device="cpu", kernels=kernels, quiet=True)
    assert run_training(read, run, where, "if-possible", StopRequest(), start) == 0
    return read_log(run / "log.jsonl")


def held_out_losses(log: list[dict[str, Any]]) -> list[float]:
    return [line["held_out_loss"] for line in log if line["event"] == "held_out"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Block -> its run, trained once for all tests."""
    return {}


@pytest.fixture
def base_of(bases: dict[str, Path], write_tiny_recipe: Write, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def make(block: str) -> Path:
        if block not in bases:
            bases[block] = tmp_path_factory.mktemp("bases") / block
            train(write_tiny_recipe(**SIZES[block]), bases[block])
        return bases[block]

    return make


def content_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_lora_of_everything_learns_and_leaves_its_base(
    block: str, kernels: str, base_of: Any, write_tiny_recipe: Write, tmp_path: Path
) -> None:
    checkpoint_of_base = list_checkpoints(base_of(block))[-1]
    before = content_of(checkpoint_of_base)
    targets = [*PROJECTIONS[block], "embedding"]
    adapter = {"rank": 4, "alpha": 8.0, "targets": targets, "tune": TUNABLE}
    run = tmp_path / "run"
    recipe = write_tiny_recipe(model=None, adapter=adapter)
    log = train(recipe, run, base_of(block), kernels)
    losses = held_out_losses(log)
    assert losses[-1] < losses[0]
    assert content_of(checkpoint_of_base) == before
    # Checkpoints hold the adapter alone, weights and moments.
    checkpoint = list_checkpoints(run)[-1]
    trained = load_file(checkpoint / "model.safetensors")
    num_factors, num_tuned = 2 * (2 * len(PROJECTIONS[block]) + 1), 2 * 5  # two layers; a convolution has two tensors
    assert len(trained) == num_factors + num_tuned
    assert not {"embedding.weight", "norm_f.weight"} & trained.keys()
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert {name.rsplit(".", 1)[0] for name in moments} == trained.keys()
    # The run, its checkpoint and its folder are the same weights, and give the loss of the log.
    opened = [open_weights(str(where)) for where in (run, checkpoint, run / "adapter")]
    assert len({weights.digest for weights in opened}) == 1
    assert opened[0].digest != read_weights(str(base_of(block))).digest
    for weights in opened[1:]:
        assert all(torch.equal(tensor, weights.tensors[name]) for name, tensor in opened[0].tensors.items())
    held_out = open_training_data(read_recipe(str(recipe), model=opened[0].section)).held_out
    assert held_out is not None
    model = build_model(opened[0], choose_backend("torch", CPU), CPU)
    again = measure_held_out(model, held_out.micro_batches(4), None).nats_per_token
    assert again == pytest.approx(losses[-1], rel=1e-5)


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_a_trained_state_learns_and_is_a_state_file(
    block: str, kernels: str, base_of: Any, write_tiny_recipe: Write, tmp_path: Path
) -> None:
    adapter = {"kind": "state", "window": True, "state_dtype": "bf16"}
    recipe = write_tiny_recipe(model=None, adapter=adapter, optimizer__learning_rate=0.1, training__total_steps=25)
    run = tmp_path / "run"
    losses = held_out_losses(train(recipe, run, base_of(block), kernels))
    assert losses[-1] < losses[0] - 0.01
    found = read_state_file(run / "tuned.state.safetensors")
    assert (found.facts.num_tokens, found.state.hidden, found.dtype) == (0, None, torch.bfloat16)
    assert found.facts.weights_sha256 == read_weights(str(base_of(block))).digest
    trained = load_file(list_checkpoints(run)[-1] / "model.safetensors")
    for index, layer in enumerate(found.state.layers):
        assert torch.equal(layer.ssm, trained[f"layers.{index}.ssm"].bfloat16())
        assert torch.equal(layer.window, trained[f"layers.{index}.window"].bfloat16())
    with pytest.raises(UserError, match="trained a state") as error:
        open_weights(str(run))
    assert "--state" in str(error.value.hint)


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_a_state_goes_on_from_a_state_file(block: str, base_of: Any, write_tiny_recipe: Write, tmp_path: Path) -> None:
    adapter: dict[str, Any] = {"kind": "state", "window": True}
    changes = {"model": None, "optimizer__learning_rate": 0.1, "training__total_steps": 10}
    first = held_out_losses(train(write_tiny_recipe(adapter=adapter, **changes), tmp_path / "one", base_of(block)))
    adapter["start"] = str(tmp_path / "one" / "tuned.state.safetensors")
    second = held_out_losses(train(write_tiny_recipe(adapter=adapter, **changes), tmp_path / "two", base_of(block)))
    assert first[0] != pytest.approx(first[-1], rel=1e-4)
    assert second[0] == pytest.approx(first[-1], rel=1e-6)
    for refused, weights, message in (
        (adapter | {"window": False}, base_of(block), "adapter.window is false"),
        (adapter, tmp_path / "other", "a state of other weights"),
        (adapter | {"start": str(tmp_path / "none")}, base_of(block), "none"),
    ):
        if not weights.exists():
            train(write_tiny_recipe(**SIZES[block], training__total_steps=3), weights)
        with pytest.raises(UserError, match=message):
            train(write_tiny_recipe(adapter=refused, **changes), tmp_path / "three", weights)
        assert not (tmp_path / "three" / "recipe.yaml").exists()


def test_an_adapter_on_an_adapter_stands_on_the_merged_weights(
    base_of: Any, write_tiny_recipe: Write, tmp_path: Path
) -> None:
    recipe = write_tiny_recipe(model=None, adapter={"rank": 2}, training__total_steps=2)
    train(recipe, tmp_path / "one", base_of("mamba1"))
    train(recipe, tmp_path / "two", tmp_path / "one")
    assert open_weights(str(tmp_path / "two")).section == read_weights(str(base_of("mamba1"))).section


def test_an_adapter_is_refused_on_other_weights(base_of: Any, write_tiny_recipe: Write, tmp_path: Path) -> None:
    mine, run = tmp_path / "mine", tmp_path / "run"
    shutil.copytree(base_of("mamba1"), mine)
    recipe = write_tiny_recipe(model=None, adapter={"rank": 2}, training__total_steps=2)
    train(recipe, run, mine)
    train(write_tiny_recipe(**SIZES["mamba1"], training__seed=9), tmp_path / "other")
    for where in (run, run / "adapter"):
        with pytest.raises(UserError, match="is an adapter for other weights"):
            open_weights(str(where), str(tmp_path / "other"))
    with pytest.raises(UserError, match="cannot go on: the weights it starts from changed"):
        train(write_tiny_recipe(model=None, adapter={"rank": 2}, training__total_steps=2), run, tmp_path / "other")
    mine.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="its base cannot be read") as error:
        open_weights(str(run))
    assert error.value.hint == "name it: --base WEIGHTS"
    assert (
        open_weights(str(run), str(tmp_path / "moved")).digest
        == open_weights(str(run / "adapter"), str(tmp_path / "moved")).digest
    )
    with pytest.raises(UserError, match="--base is for adapters"):
        open_weights(str(tmp_path / "other"), str(tmp_path / "moved"))
    with pytest.raises(UserError, match="holds an adapter, not whole weights"):
        read_weights(str(run))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_changed_adapter_folder_is_refused(name: str, base_of: Any, write_tiny_recipe: Write, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(write_tiny_recipe(model=None, adapter={"rank": 2}, training__total_steps=1), run, base_of("mamba2"))
    content = bytearray((run / "adapter" / name).read_bytes())
    content[-3] ^= 1
    (run / "adapter" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} was changed"):
        open_weights(str(run / "adapter"))
    (run / "adapter" / "mambatrain.json").unlink()
    with pytest.raises(UserError, match="mambatrain did not write"):
        open_weights(str(run / "adapter"))


def test_an_adapter_without_weights_is_refused(write_tiny_recipe: Write, tmp_path: Path) -> None:
    recipe = read_recipe(str(write_tiny_recipe(adapter={"rank": 2})))
    with pytest.raises(UserError, match="needs weights to stand on"):
        run_training(recipe, tmp_path / "run", Where("cpu", "torch", quiet=True), "if-possible", StopRequest())


def test_a_projection_that_is_zero_is_named(base_of: Any, write_tiny_recipe: Write, tmp_path: Path) -> None:
    """out_proj is 0: what stands before it gets no gradient, at the first step."""
    weights = read_weights(str(base_of("mamba1")))
    weights.tensors["layers.0.mixer.out_proj.weight"].zero_()
    recipe = read_recipe(str(write_tiny_recipe(model=None, adapter={"targets": ["in_proj"]})), model=weights.section)
    with pytest.raises(UserError, match=r"no gradient reaches layers\.0\.mixer\.in_proj\.lora_B$"):
        run_training(recipe, tmp_path / "run", Where("cpu", "torch", quiet=True), "fresh", StopRequest(), weights)


@pytest.mark.parametrize(
    ("model", "adapter", "said"),
    [
        ({"block": "mamba2"}, {"targets": ["x_proj"]}, "mamba2 has no x_proj, it has embedding, in_proj, out_proj"),
        ({}, {"targets": ["inproj"]}, "did you mean in_proj?"),
        ({}, {"targets": ["lm_head"]}, "(its head is the embedding)"),
        ({}, {"tune": ["A_logs"]}, "did you mean A_log?"),
        ({}, {"targets": ["conv1d"]}, "conv1d is no matrix; name it in adapter.tune"),
        ({}, {"tune": ["x_proj"]}, "x_proj is a matrix; name it in adapter.targets"),
        ({}, {"targets": ["in_proj", "in_proj"]}, "targets name in_proj twice"),
        ({}, {"targets": []}, "nothing would be trained"),
        ({}, {"kind": "state", "rank": 4}, "rank belongs to lora and dora, not to state; remove it"),
        ({}, {"window": True}, "window belongs to state, not to lora; remove it"),
        ({}, {"kind": "dora", "targets": ["embedding"]}, "dora has no embedding that is the head as well"),
        ({}, {"dropout": 0.1}, "adapter.dropout: no such setting"),
        ({}, {"kind": "ia3"}, "adapter.kind: input should be 'lora', 'dora' or 'state', not 'ia3'"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(model: dict[str, Any], adapter: dict[str, Any], said: str) -> None:
    content = {
        "model": {"d_model": 64, "num_layers": 1, "vocab_size": 8, **model},
        "data": {"shards": "x", "row_tokens": 8},
        "training": {"rows_per_step": 1, "total_steps": 1},
        "optimizer": {"learning_rate": 0.1},
        "adapter": adapter,
    }
    with pytest.raises(UserError) as error:
        parse_recipe(content, "mine")
    assert said in error.value.message


def test_a_trained_state_and_packed_rows_exclude_each_other(write_tiny_recipe: Write) -> None:
    with pytest.raises(UserError, match="each row holds one document"):
        read_recipe(str(write_tiny_recipe(adapter={"kind": "state"}, data__packing="best_fit")))
