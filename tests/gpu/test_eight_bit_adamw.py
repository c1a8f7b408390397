"""A state in 8 bits where its update is compiled for a GPU. Not yet run on a GPU: nobody here has had one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mambatrain.adapters.trained import TrainedTensors
from mambatrain.recipe import OptimizerSection
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.runs.folder import read_log
from mambatrain.training.optimizer import Optimizers, build_optimizers, optimizer_tensors, restore_optimizer

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'mambatrain[8bit]'")

# torch's compiler imports parts of torch that torch says are deprecated
pytestmark = pytest.mark.filterwarnings("default:`torch.jit.script:DeprecationWarning")
SECTION = OptimizerSection(learning_rate=0.01, state_precision="8bit")


def trained_from(value: torch.Tensor) -> tuple[TrainedTensors, Optimizers]:
    parameter = {"weight": nn.Parameter(value.clone())}
    trained = TrainedTensors(parameter, decaying=frozenset(parameter), matrices=frozenset())
    return trained, build_optimizers(trained, SECTION)


def move(trained: TrainedTensors, optimizers: Optimizers, steps: range) -> torch.Tensor:
    """The parameter behind updates by the gradients of these steps."""
    parameter = trained.parameters["weight"]
    for step in steps:
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        parameter.grad = gradient.to(parameter.device)
        for optimizer in optimizers:
            optimizer.step()
    return parameter.detach()


def first_value() -> torch.Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(100)).cuda()


def test_compiled_it_moves_as_its_steps_one_by_one() -> None:
    """What may part them is a neighbouring value here and there, where their fp32 differs in its last bit."""
    found = []
    for stance in ("default", "force_eager"):
        with torch.compiler.set_stance(stance):
            found.append(move(*trained_from(first_value()), range(10)) - first_value())
    assert (found[0] - found[1]).norm() < 1e-3 * found[1].norm()


def test_from_its_saved_tensors_it_goes_on_to_the_bit() -> None:
    trained, optimizers = trained_from(first_value())
    halfway = move(trained, optimizers, range(5)).clone()
    saved = {name: tensor.cpu().clone() for name, tensor in optimizer_tensors(optimizers, trained).items()}
    whole = move(trained, optimizers, range(5, 10))
    trained, optimizers = trained_from(halfway)
    restore_optimizer(optimizers, trained, saved)
    assert torch.equal(move(trained, optimizers, range(5, 10)), whole)


def test_a_run_learns_saves_and_resumes(
    run_mambatrain: Callable[..., object], write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_tiny_recipe(
        model__d_model=64, optimizer__state_precision="8bit", training__total_steps=16, checkpoint__keep_newest=9
    )
    last_losses = []
    for _ in range(2):
        done = run_mambatrain("pretrain", recipe, "--run", tmp_path / "run", "--gpus", "1")
        assert done.returncode == 0, done.stderr
        log = read_log(tmp_path / "run" / "log.jsonl")
        losses = [line["held_out_loss"] for line in log if line["event"] == "held_out"]
        assert losses[-1] < losses[0] - 0.3
        last_losses.append(losses[-1])
        _first, *later = list_checkpoints(tmp_path / "run")
        assert load_file(later[-1] / "optimizer.safetensors")["embedding.weight.exp_avg_codes"].dtype == torch.uint8
        for checkpoint in later:
            shutil.rmtree(checkpoint)
    assert last_losses[0] == pytest.approx(last_losses[1], rel=1e-3)
