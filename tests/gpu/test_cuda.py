"""What a CPU cannot show. Not yet run on a GPU: nobody here has had one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.ops.self_check import check_backend
from mambatrain.recipe import ModelSection
from mambatrain.runs.folder import read_log

CUDA = torch.device("cuda")
MODELS = {
    "mamba1": ModelSection(block="mamba1", d_model=64, num_layers=2, vocab_size=128),
    "mamba2": ModelSection(block="mamba2", d_model=64, num_layers=2, vocab_size=128, head_dim=32, d_state=32),
}


@pytest.mark.parametrize("block", MODELS)
def test_the_backend_that_auto_chooses_agrees_with_the_reference(block: str) -> None:
    assert check_backend(choose_backend("auto", CUDA), block, CUDA).passed


@pytest.mark.parametrize("block", MODELS)
def test_logits_and_gradients_are_those_of_the_cpu(block: str) -> None:
    tokens = torch.randint(0, 128, (2, 100), generator=torch.Generator().manual_seed(0))
    found = {}
    for device in (torch.device("cpu"), CUDA):
        model = LanguageModel(MODELS[block], choose_backend("torch", device)).to(device)
        initialise(model, MODELS[block], seed=0)
        logits, _ = model(tokens.to(device))
        logits.square().mean().backward()
        gradients = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
        found[device.type] = logits.detach().cpu(), gradients
    (cpu_logits, cpu_gradients), (logits, gradients) = found["cpu"], found["cuda"]
    assert (logits - cpu_logits).abs().max() <= 1e-4 * cpu_logits.abs().max()
    for name, expected in cpu_gradients.items():
        assert (gradients[name] - expected).norm() <= 1e-3 * expected.norm(), name


def test_a_run_in_bf16_learns_and_records_its_device(
    run_mambatrain: Callable[..., object], write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_tiny_recipe(training__total_steps=40, training__precision="auto")
    done = run_mambatrain("pretrain", recipe, "--run", tmp_path / "run", "--gpus", "1")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["precision"] == "bf16"
    assert "cpu" not in facts["device"]
    held_out = [
        line["held_out_loss"] for line in read_log(tmp_path / "run" / "log.jsonl") if line["event"] == "held_out"
    ]
    assert held_out[-1] < held_out[0] - 0.3
