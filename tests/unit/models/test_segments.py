"""Rows in segments: the loss and the gradients of the whole row, in the memory of a segment."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops import native
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection

BLOCKS = ["mamba1", "mamba2"]
CPU = torch.device("cpu")


def small_model(block: str, backend: str, dtype: torch.dtype, **changes: object) -> LanguageModel:
    if backend == "native" and (missing := native.why_unavailable()) is not None:
        pytest.skip(missing)
    sizes: dict[str, object] = {"d_model": 16, "num_layers": 2, "d_state": 4, "vocab_size": 64}
    sizes |= {"head_dim": 8} if block == "mamba2" else {}
    section = ModelSection.model_validate({"block": block, **sizes, **changes})
    model = LanguageModel(section, choose_backend(backend, CPU)).to(dtype)
    initialise(model, section, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.sub_(3.0)  # what a token leaves behind reaches far ahead
    return model


def rows(length: int, num_rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, 64, (num_rows, length + 1), generator=generator)
    boundaries = torch.rand(num_rows, length, generator=generator) < 0.02
    return tokens[:, :-1], boundaries, tokens[:, 1:]


def loss_and_gradients(model: LanguageModel, segment_tokens: int, batch: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    model.segment_tokens = segment_tokens
    _, state = model.hidden_states(batch[0][:, :5].flip(0))  # rows that go on from something
    state = [type(layer)(*(tensor.detach().requires_grad_() for tensor in layer)) for layer in state]
    loss, behind = model.loss_and_state(*batch, state)
    wanted = [*model.parameters(), *(tensor for layer in state for tensor in layer)]
    gradients = torch.autograd.grad(loss, wanted)
    return [loss.detach(), *gradients, *(tensor for layer in behind for tensor in layer)]


@pytest.mark.parametrize("recompute_every", [0, 1])
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("block", BLOCKS)
def test_segments_give_the_loss_gradients_and_states_of_the_whole_row(
    block: str, backend: str, recompute_every: int
) -> None:
    dtype, tolerance = (torch.float64, 1e-10) if backend == "torch" else (torch.float32, 1e-4)
    model = small_model(block, backend, dtype)
    model.recompute_every = recompute_every
    batch = rows(150)
    whole = loss_and_gradients(model, 0, batch)
    assert all((value != 0).any() for value in whole), "something has no gradient"
    for segment_tokens in (1 if backend == "torch" and not recompute_every else 25, 64, 149):
        for found, wanted in zip(loss_and_gradients(model, segment_tokens, batch), whole, strict=True):
            assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


# Each length in a fork of its own; after a first one that imports what torch needs for it.
SCRIPT = """
import os, resource, sys, torch
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection

torch.set_num_threads(1)
section = ModelSection(block=sys.argv[1], d_model=64, num_layers=2, vocab_size=256, d_state=16)
model = LanguageModel(section, choose_backend("torch", torch.device("cpu")))
initialise(model, section, seed=0)
model.segment_tokens = 512
tokens = torch.arange(512 * 32)[None] % 256
model.summed_loss(tokens[:, :516], None, tokens[:, :516]).backward()
for num_segments, model.segment_tokens in ((1, 0), (2, 512), (32, 512), (4, 0)):
    if (child := os.fork()) == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row = tokens[:, : 512 * num_segments]
        model.summed_loss(row, None, row).backward()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("block", BLOCKS)
def test_the_peak_does_not_grow_with_the_row(block: str) -> None:
    command = [sys.executable, "-P", "-c", SCRIPT, block]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    one, two, thirty_two, four_whole = map(int, done.stdout.split())
    shown = f"{[one, two, thirty_two, four_whole]} KiB"
    assert thirty_two < 1.35 * two, shown
    assert thirty_two < four_whole, shown
    assert two < 2 * one, shown


def test_gradients_of_segments_are_summed_in_fp32_under_bf16() -> None:
    """Autocast keeps a narrowed weight while it is on; gradients that went through it would be summed in bf16."""
    model, batch = small_model("mamba1", "torch", torch.float32), rows(512, 1)
    exact = small_model("mamba1", "torch", torch.float64)
    wanted = torch.autograd.grad(exact.summed_loss(*batch), list(exact.parameters()))

    def error(segment_tokens: int) -> float:
        model.segment_tokens = segment_tokens
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.summed_loss(*batch)
        found = torch.autograd.grad(loss, list(model.parameters()))
        return max(
            float((one - other).norm() / other.norm())
            for (name, _), one, other in zip(model.named_parameters(), found, wanted, strict=True)
            if name.endswith("_proj.weight")
        )

    assert error(4) < 1.5 * error(0)
