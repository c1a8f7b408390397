"""The C++ kernels as operators of torch: built, traced, refused by name; any strides, threads and memory they meet."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mambatrain.errors import UserError
from mambatrain.ops import native, reference
from mambatrain.ops.backends import choose_backend
from mambatrain.ops.native.cpu import library

CPU = torch.device("cpu")
Scan = Callable[..., tuple[Tensor, Tensor]]
Tensors = dict[str, Tensor]

built = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))


def scan_arguments(rows: int = 2, length: int = 37, channels: int = 21, states: int = 16) -> Tensors:
    """As a block makes them: views of what its projections return."""
    generator = torch.Generator().manual_seed(length)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    u, z = randn(rows, length, 2 * channels).split(channels, dim=-1)
    dt, B, C = randn(rows, length, channels + 2 * states).split([channels, states, states], dim=-1)
    boundaries = torch.rand(rows, length, generator=generator) < 0.1
    fixed = {"A": -randn(channels, states).exp(), "D": randn(channels), "dt_bias": randn(channels)}
    carried = {"initial_state": randn(rows, channels, states), "boundaries": boundaries}
    return {"u": u, "dt": dt, "B": B, "C": C, "z": z} | fixed | carried


def conv_arguments(rows: int = 2, length: int = 37, channels: int = 21, taps: int = 4) -> Tensors:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(rows, length, 2 * channels, generator=generator)[..., :channels]
    weight = torch.randn(channels, taps, generator=generator)
    window = torch.randn(rows, taps - 1, channels, generator=generator)
    boundaries = torch.rand(rows, length, generator=generator) < 0.1
    return {"x": x, "weight": weight, "bias": weight[:, 0], "initial_window": window, "boundaries": boundaries}


def ssd_arguments(rows: int = 2, length: int = 37, heads: int = 6, channels: int = 8, states: int = 24) -> Tensors:
    generator = torch.Generator().manual_seed(length)
    sizes = [heads * channels, 2 * states, 2 * states, heads]  # two groups of heads
    x, B, C, dt = torch.randn(rows, length, sum(sizes), generator=generator).split(sizes, dim=-1)
    head = torch.randn(heads, generator=generator)
    boundaries = torch.rand(rows, length, generator=generator) < 0.1
    state = torch.randn(rows, heads, channels, states, generator=generator)
    along_time = {"x": x.unflatten(-1, (heads, channels)), "dt": dt}
    along_time |= {"B": B.unflatten(-1, (2, states)), "C": C.unflatten(-1, (2, states))}
    return along_time | {"A": -head.exp(), "D": head, "dt_bias": head, "initial_state": state, "boundaries": boundaries}


OPERATORS: dict[str, tuple[Scan, Callable[..., Tensors]]] = {
    "selective_scan": (native.selective_scan, scan_arguments),
    "ssd": (native.ssd, ssd_arguments),
    "causal_conv": (native.causal_conv, conv_arguments),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def run(scan: Scan, arguments: Tensors) -> list[Tensor]:
    """Outputs and every gradient; gradients of views reach the view alone."""
    leaves = {
        name: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in arguments.items()
    }
    outputs = scan(**leaves)
    floats = [tensor for tensor in leaves.values() if tensor.is_floating_point()]
    weights = [torch.cos(torch.arange(out.numel())).view(out.shape).to(out.dtype) for out in outputs]
    return [out.detach() for out in outputs] + list(torch.autograd.grad(outputs, floats, weights))


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_the_kernels_were_built() -> None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip(f"kernels are not built for {sys.platform} {platform.machine()}")
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("this machine has no C++ compiler")
    assert native.why_unavailable() is None
    levels = ("neon",) if platform.machine() == "aarch64" else ("x86-64-v2", "x86-64-v3", "x86-64-v4")
    assert [level for level in levels if not library.library_path(level).exists()] == []


@built
@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_views_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    scan, make = OPERATORS[name]
    arguments = {key: tensor.to(dtype) if tensor.dim() >= 3 else tensor for key, tensor in make().items()}
    contiguous = {key: tensor.contiguous() for key, tensor in arguments.items()}
    # every second channel of a wider tensor; time and channels exchanged in memory; one row for all
    spread = {key: torch.stack([tensor, tensor], dim=-1).flatten(-2)[..., ::2] for key, tensor in contiguous.items()}
    exchanged = {key: tensor.mT.contiguous().mT if tensor.dim() >= 3 else tensor for key, tensor in contiguous.items()}
    wanted = run(scan, contiguous)
    for views in (arguments, spread, exchanged):
        assert_same_bits(run(scan, views), wanted)
    first = {key: tensor[:1] if tensor.shape[0] == 2 else tensor for key, tensor in contiguous.items()}
    expanded = {
        key: tensor.expand(2, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor for key, tensor in first.items()
    }
    assert_same_bits([tensor[1:] for tensor in scan(**expanded)], list(scan(**first)))


@built
@every_operator
def test_the_same_bits_on_any_number_of_threads(name: str) -> None:
    scan, make = OPERATORS[name]
    arguments = make(rows=2, length=300, channels=64 if name == "ssd" else 600)  # enough work that threads share it
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 4, 2):
            torch.set_num_threads(num_threads)
            results.append(run(scan, arguments))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@built
@every_operator
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("length", [0, 1, 33])
def test_no_memory_is_read_before_it_is_written(name: str, length: int) -> None:
    scan, make = OPERATORS[name]
    for arguments in (make(length=length), make(rows=0, length=length)):
        found = run(scan, arguments)
        torch.use_deterministic_algorithms(False)
        wanted = run(scan, arguments)
        torch.use_deterministic_algorithms(True)
        assert all(tensor.isfinite().all() for tensor in found)
        assert_same_bits(found, wanted)


@built
@every_operator
def test_an_empty_row_hands_its_state_on(name: str) -> None:
    scan, make = OPERATORS[name]
    arguments = make(length=0)
    carried = arguments["initial_window" if name == "causal_conv" else "initial_state"].requires_grad_()
    out, state = scan(**arguments)
    assert out.shape[1] == 0
    assert torch.equal(state, carried)
    state.sum().backward()
    assert torch.equal(carried.grad, torch.ones_like(carried))


@built
@every_operator
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.mambatrain, name).default
    arguments = OPERATORS[name][1]()
    names = [argument.name for argument in operator._schema.arguments]
    fixed = {} if name == "causal_conv" else {"keep_entries": True}
    leaves = {key: tensor.detach().requires_grad_(tensor.is_floating_point()) for key, tensor in arguments.items()}
    torch.library.opcheck(operator, tuple((leaves | fixed)[key] for key in names))
    bare = {
        key: None if key in ("D", "z", "dt_bias", "bias", "boundaries") or key.startswith("initial") else tensor
        for key, tensor in leaves.items()
    }
    torch.library.opcheck(operator, tuple((bare | fixed)[key] for key in names))


@built
@every_operator
def test_compile_traces_the_whole(name: str) -> None:
    scan, make = OPERATORS[name]
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 37, 64):
        arguments = make(length=length)
        assert_same_bits(run(compiled, arguments), run(scan, arguments))


@built
@every_operator
def test_meta_tensors_have_the_right_shapes(name: str) -> None:
    scan, make = OPERATORS[name]
    arguments = {key: tensor.bfloat16() if tensor.dim() >= 3 else tensor for key, tensor in make().items()}
    real = scan(**arguments)
    meta = scan(**{key: tensor.to("meta") for key, tensor in arguments.items()})
    assert [(out.shape, out.dtype, out.device.type) for out in meta] == [(out.shape, out.dtype, "meta") for out in real]


@built
def test_a_nan_stays_one_in_bf16() -> None:
    """Rounding to bf16 adds to the bits; those of a NaN, all set, would roll over to -0."""
    payload = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    out, _ = native.causal_conv(torch.ones(1, 5, 40, dtype=torch.bfloat16), payload.expand(40, 4))
    assert out.isnan().all()


@built
def test_offsets_beyond_32_bits() -> None:
    """A view whose second row begins past 2^32 bytes; only the pages it touches are ever used."""
    try:
        memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"this machine gives no 4 GB of addresses: {error}")
    x = memory.as_strided((2, 3, 8), (2**31, 8, 1))
    x.copy_(torch.randn(2, 3, 8))
    weight = torch.randn(8, 4)
    assert_same_bits(list(native.causal_conv(x, weight)), list(native.causal_conv(x.contiguous(), weight)))


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 37, 21, dtype=torch.float64)}, "u has dtype torch.float64"),
        ({"B": torch.zeros(2, 37, 16, dtype=torch.float16)}, "B has dtype torch.float16"),
        (
            {"A": torch.zeros(21, 300), "B": torch.zeros(2, 37, 300), "C": torch.zeros(2, 37, 300)},
            "N should be 1 to 256",
        ),
        ({"dt": torch.zeros(2, 36, 21)}, r"should be .* \(2, 37, 21\)"),
        ({"boundaries": torch.zeros(2, 37)}, "boundaries has dtype"),
    ],
)
def test_a_scan_that_does_not_fit_is_refused(change: Tensors, message: str) -> None:
    arguments = {key: tensor for key, tensor in scan_arguments().items() if key != "initial_state"}
    with pytest.raises(ValueError, match=message):
        native.selective_scan(**(arguments | change))


@built
def test_a_conv_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="W should be 1 to 4"):
        native.causal_conv(torch.zeros(1, 9, 3), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="x has dtype"):
        native.causal_conv(torch.zeros(1, 9, 3, dtype=torch.float64), torch.zeros(3, 4))


@built
def test_auto_takes_the_kernels() -> None:
    assert choose_backend("auto", CPU).name == "native"
    assert library.processor_level() in choose_backend("native", CPU).reason


@built
def test_an_fp64_model_is_not_for_the_kernels() -> None:
    chosen = choose_backend("auto", CPU, torch.float64)
    assert chosen.name == "torch"
    assert "float64" in chosen.reason
    with pytest.raises(UserError, match="float64"):
        choose_backend("native", CPU, torch.float64)


def test_kernels_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "processor_level", lambda: "x86-64-v9")
    chosen = choose_backend("auto", CPU)
    assert chosen.name == "torch"
    assert "mambatrain-x86-64-v9.so is not part of this installation" in chosen.reason
    with pytest.raises(UserError, match="not part of this installation") as refused:
        choose_backend("native", CPU)
    assert "g++" in str(refused.value.hint)


def test_the_reference_is_what_the_kernels_are_held_to() -> None:
    """The same argument names and defaults, so that one can stand for the other."""
    import inspect

    for name, (ours, _) in OPERATORS.items():
        theirs = getattr(reference, name)
        assert inspect.signature(ours) == inspect.signature(theirs)
