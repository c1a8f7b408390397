"""Mamba-2's scan in Triton on a device, against the fp64 reference there. Not yet run on a GPU: nobody has had one."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
import yardstick
from torch import Tensor
from yardstick import LENGTHS, Tensors, boundaries_around

from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.ops.triton.ssd import FLOATS, ssd
from mambatrain.recipe import ModelSection

CUDA = torch.device("cuda")
SSD = replace(yardstick.SSD, native=ssd)
EDGES = (32, 64, 96, 128, 192, 256)  # of tiles and chunks of either size
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def on_device(arguments: Tensors) -> Tensors:
    return {name: tensor.to(CUDA) for name, tensor in arguments.items()}


def assert_as_right_as_the_reference(arguments: Tensors, boundaries: Tensor | None = None) -> None:
    moved = None if boundaries is None else boundaries.to(CUDA)
    yardstick.assert_as_right_as_the_reference(SSD, on_device(arguments), moved)


def run(arguments: Tensors, boundaries: Tensor | None = None) -> list[Tensor]:
    return list(yardstick.run(ssd, arguments, boundaries).values())


def test_it_is_what_auto_takes() -> None:
    assert choose_backend("auto", CUDA).ssd is ssd


@every_dtype
@pytest.mark.parametrize("length", [*LENGTHS, 128, 129, 255, 257, 2049])
def test_lengths(length: int, dtype: torch.dtype) -> None:
    rows = 1 if length > 1000 else 3
    arguments = SSD.arguments(dtype, R=rows, L=length, H=6, P=24, N=40)
    assert_as_right_as_the_reference(arguments, boundaries_around(EDGES, length)[:rows])
    assert_as_right_as_the_reference(arguments)


@every_dtype
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (24, 1), (9, 3), (8, 8)])
@pytest.mark.parametrize(("channels", "states"), [(1, 1), (8, 8), (64, 128), (33, 70), (128, 64), (256, 256)])
def test_sizes(heads: int, groups: int, channels: int, states: int, dtype: torch.dtype) -> None:
    arguments = SSD.arguments(dtype, R=2, L=150, H=heads, G=groups, P=channels, N=states)
    assert_as_right_as_the_reference(arguments, boundaries_around(EDGES, 150)[:2])


@every_dtype
def test_optional_arguments(dtype: torch.dtype) -> None:
    for left_out in [(name,) for name in SSD.optional] + [SSD.optional]:
        arguments = {name: tensor for name, tensor in SSD.arguments(dtype, L=67).items() if name not in left_out}
        assert_as_right_as_the_reference(arguments, boundaries_around((32, 64), 67))
        assert_as_right_as_the_reference(arguments)


@every_dtype
def test_the_same_bits_each_time_and_no_memory_read_before_it_is_written(dtype: torch.dtype) -> None:
    arguments = on_device(SSD.arguments(dtype, L=300, H=24, P=64, N=128, G=1))
    boundaries = boundaries_around(EDGES, 300).to(CUDA)
    wanted = run(arguments, boundaries)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        again = [run(arguments, boundaries) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    for found in again:
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.isfinite().all()


@every_dtype
def test_gradients_of_other_documents_are_exactly_0(dtype: torch.dtype) -> None:
    lengths = [63, 2, 64, 1, 150]
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    leaves = {name: tensor.requires_grad_() for name, tensor in on_device(SSD.arguments(dtype, R=1, L=280)).items()}
    boundaries = torch.zeros(1, 280, dtype=torch.bool, device=CUDA)
    boundaries[:, starts] = True
    out, _ = ssd(**leaves, boundaries=boundaries)
    for start, length in zip(starts, lengths, strict=True):
        span = slice(start, start + length)
        names = ("x", "dt", "B", "C")
        grads = torch.autograd.grad(out[:, span].float().sum(), [leaves[name] for name in names], retain_graph=True)
        for name, grad in zip(names, grads, strict=True):
            assert grad[:, span].any(), name
            grad[:, span] = 0
            assert not grad.any(), name


def test_opcheck() -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in on_device(SSD.arguments(L=70)).items()}
    leaves["boundaries"] = boundaries_around((32,), 70).to(CUDA)
    operator = torch.ops.mambatrain.ssd_triton.default
    torch.library.opcheck(operator, tuple(leaves[argument.name] for argument in operator._schema.arguments))


def test_memory_grows_with_the_sequence_and_not_with_the_state() -> None:
    """A training step's peak above its inputs and gradients: states at the ends of chunks, not of positions."""
    peaks = []
    for states in (16, 128):
        arguments = on_device(SSD.arguments(torch.bfloat16, R=1, L=8192, H=24, P=64, N=states, G=1))
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(arguments)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    state_of_every_position = 8192 * 24 * 64 * 128 * 4
    assert max(peaks) < state_of_every_position / 8


def test_a_model_in_a_cuda_graph_and_compiled() -> None:
    section = ModelSection(block="mamba2", d_model=64, num_layers=2, vocab_size=128, head_dim=32, d_state=32)
    model = LanguageModel(section, choose_backend("native", CUDA)).to(CUDA)
    initialise(model, section, seed=0)
    tokens = torch.randint(0, 128, (2, 100), device=CUDA)
    with torch.no_grad():
        wanted, _ = model(tokens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found, _ = model(tokens)
        graph.replay()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        compiled, _ = torch.compile(model, fullgraph=True)(tokens)
        torch.testing.assert_close(compiled, wanted, rtol=1e-4, atol=1e-4)
