"""The step without memory holds what the step holds; the heap is filled as glibc fills it."""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
import sys

import pytest
import torch

from mambatrain.models.language_model import LanguageModel
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import Recipe, read_recipe
from mambatrain.training.build import build_objective
from mambatrain.training.heap import reach
from mambatrain.training.optimizer import build_optimizers
from mambatrain.training.step_trace import StorageLog, trace_steps

CPU = torch.device("cpu")


def recipe_of(block: str, checkpointing: str) -> Recipe:
    sizes = ["model.d_model=64", "model.num_layers=4", "model.vocab_size=500", "data.row_tokens=128"]
    return read_recipe(f"{block}-130m", [*sizes, f"training.activation_checkpointing={checkpointing}"])


def run_really(recipe: Recipe, rows: int) -> StorageLog:
    """Two steps with memory, in which each storage is noted as it is in the trace."""
    with StorageLog() as log:
        objective, trained = build_objective(recipe, choose_backend("torch", CPU), CPU, "fp32", None, 1, begins=True)
        optimizers = build_optimizers(trained, recipe.optimizer)
        tokens = torch.zeros(rows, recipe.data.row_tokens, dtype=torch.int64)
        for _ in range(2):
            objective(tokens, torch.zeros_like(tokens, dtype=torch.bool), tokens).backward()
            for optimizer in optimizers:
                optimizer.step()
            objective.zero_grad(set_to_none=True)
    return log


@pytest.mark.parametrize(
    ("block", "checkpointing"),
    [("mamba1", "none"), ("mamba1", "every_block"), ("mamba1", "2"), ("mamba2", "none"), ("mamba2", "every_block")],
)
def test_the_fullest_moment_is_that_of_a_real_step(block: str, checkpointing: str) -> None:
    recipe = recipe_of(block, checkpointing)
    real = sum(run_really(recipe, 3).trace().fullest().values())
    planned = trace_steps(recipe, choose_backend("torch", CPU), "fp32", 3, 1)
    assert sum(planned.fullest().values()) == pytest.approx(real, rel=0.01)


def test_parts_are_what_they_are_called() -> None:
    recipe = recipe_of("mamba2", "none")
    model = LanguageModel(recipe.model, choose_backend("torch", CPU))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    fullest = trace_steps(recipe, choose_backend("torch", CPU), "fp32", 1, 2).fullest()
    assert fullest["weights"] == weights
    assert fullest["gradients"] == pytest.approx(weights, rel=0.01)  # of the micro-batch before
    assert fullest["optimizer"] == pytest.approx(2 * weights, rel=0.01)  # and a count each


# Sizes whose order leaves holes: what a freed block leaves is too small for the next of its size.
SEQUENCE = [
    *((index, 1_000_000 * (index % 7 + 1)) for index in range(60)),
    *((index, -1) for index in range(0, 60, 3)),
    *((100 + index, 900_000 * (index % 11 + 1)) for index in range(40)),
    *((index, -1) for index in range(1, 60, 3)),
    *((200 + index, 2_000_000 * (index % 5 + 1)) for index in range(40)),
]
GLIBC = """
import ctypes, json, sys
libc = ctypes.CDLL(None)
libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)
libc.sbrk.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
sequence = json.loads(sys.stdin.read())
start, held = libc.sbrk(0), {}
for block, num_bytes in sequence:
    if num_bytes < 0:
        libc.free(held.pop(block))
    else:
        place = ctypes.c_void_p()
        assert libc.posix_memalign(ctypes.byref(place), 64, num_bytes) == 0
        held[block] = place.value
print(libc.sbrk(0) - start)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason=f"{platform.system()} has another C library")
def test_the_heap_reaches_as_far_as_the_c_librarys() -> None:
    command = [sys.executable, "-S", "-c", GLIBC]
    done = subprocess.run(command, input=json.dumps(SEQUENCE), capture_output=True, text=True, timeout=60, check=True)
    sizes, alive, most = dict(SEQUENCE[:60] + SEQUENCE[80:120] + SEQUENCE[140:]), 0, 0
    for block, num_bytes in SEQUENCE:
        alive += num_bytes if num_bytes > 0 else -sizes[block]
        most = max(most, alive)
    reached = reach(SEQUENCE)
    assert reached == pytest.approx(int(done.stdout), rel=0.02)
    assert reached > 1.03 * most  # the sequence does leave holes
