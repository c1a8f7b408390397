"""The CUDA kernels on a device, against the reference in fp64 there. Not yet run on a GPU: nobody here has had one."""

from __future__ import annotations

import threading

import pytest
import torch
import yardstick
from torch import Tensor
from yardstick import CONV, GOLDEN, LENGTHS, SELECTIVE_SCAN, Operator, Tensors, boundaries_around

from mambatrain.ops import native, reference
from mambatrain.ops.backends import choose_backend
from mambatrain.ops.native.cuda.programs import ELEMENTS

CUDA = torch.device("cuda")
OPERATORS = (SELECTIVE_SCAN, CONV)
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
every_dtype = pytest.mark.parametrize("dtype", ELEMENTS, ids=ELEMENTS.values())


def on_device(arguments: Tensors) -> Tensors:
    return {name: tensor.to(CUDA) for name, tensor in arguments.items()}


def assert_as_right_as_the_reference(operator: Operator, arguments: Tensors, boundaries: Tensor | None = None) -> None:
    moved = None if boundaries is None else boundaries.to(CUDA)
    yardstick.assert_as_right_as_the_reference(operator, on_device(arguments), moved)


def test_native_kernels_are_what_auto_takes() -> None:
    chosen = choose_backend("auto", CUDA)
    assert (chosen.name, chosen.selective_scan, chosen.causal_conv) == (
        "native",
        native.selective_scan,
        native.causal_conv,
    )


@every_dtype
@every_operator
@pytest.mark.parametrize("length", [*LENGTHS, 2047, 2049])
def test_lengths(operator: Operator, length: int, dtype: torch.dtype) -> None:
    rows = 1 if length > 1000 else 3
    boundaries = boundaries_around((16, 32, 64, 1024), length)[:rows]
    for channels in (17, 132):
        arguments = operator.arguments(dtype, R=rows, L=length, E=channels)
        assert_as_right_as_the_reference(operator, arguments, boundaries)
    assert_as_right_as_the_reference(operator, operator.arguments(dtype, R=rows, L=length, E=1))


@pytest.mark.parametrize("states", [1, 8, 16, 17, 64, 128, 256])
def test_states(states: int) -> None:
    for channels in (3, 130, 1536):
        arguments = SELECTIVE_SCAN.arguments(R=2, E=channels, N=states)
        assert_as_right_as_the_reference(SELECTIVE_SCAN, arguments, boundaries_around((16, 32), 35)[:2])


def test_a_batch_that_fills_the_device() -> None:
    """Two channels a thread; the small ones above have one."""
    for dtype in ELEMENTS:
        arguments = SELECTIVE_SCAN.arguments(dtype, R=16, L=65, E=2048)
        boundaries = boundaries_around((16, 32, 64), 65).repeat(6, 1)[:16]
        assert_as_right_as_the_reference(SELECTIVE_SCAN, arguments, boundaries)


@every_operator
def test_optional_arguments(operator: Operator) -> None:
    for left_out in [(name,) for name in operator.optional] + [operator.optional]:
        arguments = {name: tensor for name, tensor in operator.arguments(L=67).items() if name not in left_out}
        assert_as_right_as_the_reference(operator, arguments, boundaries_around((32, 64), 67))
        assert_as_right_as_the_reference(operator, arguments)


@every_operator
def test_a_boundary_anywhere(operator: Operator) -> None:
    assert_as_right_as_the_reference(operator, operator.arguments(R=70, L=70, E=4), torch.eye(70, dtype=torch.bool))


@every_dtype
@every_operator
def test_the_same_bits_every_time(operator: Operator, dtype: torch.dtype) -> None:
    arguments = on_device(operator.arguments(dtype, R=4, L=300, E=520))
    boundaries = (torch.rand(4, 300, generator=torch.Generator().manual_seed(0)) < 0.02).to(CUDA)
    first = yardstick.run(operator.native, arguments, boundaries)
    for _ in range(5):
        again = yardstick.run(operator.native, arguments, boundaries)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


@every_operator
def test_no_memory_is_read_before_it_is_written(operator: Operator) -> None:
    arguments = on_device(operator.arguments(L=70, E=33))
    wanted = yardstick.run(operator.native, arguments)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=CUDA).isnan().all()
        found = yardstick.run(operator.native, arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@every_operator
def test_opcheck(operator: Operator) -> None:
    arguments = on_device(operator.arguments()) | {"boundaries": boundaries_around((16,), 35).to(CUDA)}
    leaves = {
        name: tensor.detach().requires_grad_(tensor.is_floating_point()) for name, tensor in arguments.items()
    } | ({"keep_entries": True} if operator is SELECTIVE_SCAN else {})
    registered = getattr(torch.ops.mambatrain, operator.name).default
    torch.library.opcheck(registered, tuple(leaves[argument.name] for argument in registered._schema.arguments))


@every_operator
def test_compile_traces_the_whole(operator: Operator) -> None:
    compiled = torch.compile(operator.native, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 37, 64):
        arguments = on_device(operator.arguments(L=length))
        found, wanted = yardstick.run(compiled, arguments), yardstick.run(operator.native, arguments)
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@every_operator
@pytest.mark.parametrize("length", [1, 70])
def test_graph_capture(operator: Operator, length: int) -> None:
    """Forward and backward, recorded once and replayed on other values."""
    arguments = on_device(operator.arguments(L=length))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and loads, which no graph can hold
        yardstick.run(operator.native, arguments)
    torch.cuda.current_stream().wait_stream(side)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in arguments.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, state = operator.native(**leaves)
        grads = torch.autograd.grad(out.square().sum() + state.square().sum(), list(leaves.values()))
    others = on_device(operator.arguments(L=length, seed=7))
    with torch.no_grad():
        for name, tensor in others.items():
            leaves[name].copy_(tensor)
    graph.replay()
    fresh = {name: tensor.requires_grad_() for name, tensor in others.items()}
    wanted_out, wanted_state = operator.native(**fresh)
    wanted = torch.autograd.grad(wanted_out.square().sum() + wanted_state.square().sum(), list(fresh.values()))
    for found, expected in zip((out, state, *grads), (wanted_out, wanted_state, *wanted), strict=True):
        assert torch.equal(found, expected)


@every_operator
def test_streams_and_threads(operator: Operator) -> None:
    """A thread that has never met the device, on a stream of its own."""
    arguments = on_device(operator.arguments(L=70))
    wanted = [out.clone() for out in operator.native(**arguments)]
    torch.cuda.synchronize()
    found: list[Tensor] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.extend(operator.native(**arguments))
            torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@every_operator
def test_every_device(operator: Operator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    arguments = operator.arguments(L=70)
    results = [
        [
            out.cpu()
            for out in operator.native(**{name: tensor.to(f"cuda:{index}") for name, tensor in arguments.items()})
        ]
        for index in range(torch.cuda.device_count())
    ]
    for result in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, results[0], strict=True))


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the golden file lies in a folder beside the repository, absent here")
@pytest.mark.parametrize("layer", ["layer0", "layer3", "layer5"])
def test_a_trained_models_scan(layer: str) -> None:
    inputs, wanted = yardstick.read_golden_scan(layer)
    moved = [tensor.to(CUDA) for tensor in inputs]
    for ours, theirs, truth in zip(
        native.selective_scan(*moved), reference.selective_scan(*moved), wanted, strict=True
    ):
        assert float((ours[0].cpu() - truth).abs().max()) <= 2 * float((theirs[0].cpu() - truth).abs().max())
