"""The kernels of a single position in Triton, interpreted on the CPU, against the reference in fp64.

They are reached as on a GPU, through the operators: only what asks whether a tensor lies on one is answered otherwise.
`tests/parity/test_triton.py` runs this in a process of its own, where TRITON_INTERPRET is set before any import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
import triton_interpreter  # noqa: F401  changes it
import yardstick
from torch import Tensor
from yardstick import CONV, SELECTIVE_SCAN, Operator, Tensors

from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops import native
from mambatrain.ops.backends import Backend, choose_backend
from mambatrain.ops.native.cuda import causal_conv as cuda_conv
from mambatrain.ops.native.cuda import launching
from mambatrain.ops.native.cuda import selective_scan as cuda_scan
from mambatrain.ops.triton import arguments as triton_arguments
from mambatrain.ops.triton import steps
from mambatrain.ops.triton.ssd import ssd
from mambatrain.recipe import ModelSection

SSD = replace(yardstick.SSD, native=ssd)
OPERATORS = (CONV, SELECTIVE_SCAN, SSD)
KERNELS = {"causal_conv": "step_conv", "selective_scan": "step_selective_scan", "ssd": "step_ssd"}
STARTS = {"none": None, "continues": [False] * 3, "all start": [True] * 3, "some start": [True, False, True]}
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """CPU tensors go through CUDA's bindings; gives the names of the kernels that ran."""
    names: list[str] = []
    launch = triton_arguments.launch

    def record(kernel: Any, *rest: Any, **constants: Any) -> None:
        names.append(kernel.__name__)
        launch(kernel, *rest, **constants)

    monkeypatch.setattr(triton_arguments, "launch", record)
    monkeypatch.setattr(steps, "is_step", lambda x: x.shape[1] == 1)
    monkeypatch.setitem(import_module("mambatrain.ops.native.selective_scan").IMPLEMENTATIONS, "cpu", cuda_scan)
    monkeypatch.setitem(import_module("mambatrain.ops.native.causal_conv").IMPLEMENTATIONS, "cpu", cuda_conv)
    yield names


def starts(which: str, rows: int = 3) -> Tensor | None:
    chosen = STARTS[which]
    return None if chosen is None else torch.tensor(chosen)[:rows, None]


def outputs(operator: Callable[..., tuple[Tensor, Tensor]], arguments: Tensors, boundaries: Tensor | None) -> Tensors:
    out, state = operator(**arguments, boundaries=boundaries)
    return {"out": out, "state": state}


def assert_as_right_as_the_reference(
    operator: Operator, arguments: Tensors, boundaries: Tensor | None, launched: list[str]
) -> None:
    """As `yardstick` has it, without gradients, which a step has none of."""
    truth = outputs(operator.reference, {name: tensor.double() for name, tensor in arguments.items()}, boundaries)
    plain = outputs(operator.reference, arguments, boundaries)
    before = len(launched)
    found = outputs(operator.native, arguments, boundaries)
    assert launched[before:] == [KERNELS[operator.name]]
    for name, wanted in truth.items():
        assert (found[name].shape, found[name].dtype) == (wanted.shape, plain[name].dtype)
        if wanted.numel() == 0:  # the window of a single tap
            continue
        ours, theirs = (float((one[name].double() - wanted).abs().max()) for one in (found, plain))
        assert ours <= 2 * theirs + 16 * yardstick.ROUNDING * float(wanted.abs().max()), name


@every_dtype
@every_operator
@pytest.mark.parametrize("which", STARTS)
def test_a_position(operator: Operator, which: str, dtype: torch.dtype, launched: list[str]) -> None:
    assert_as_right_as_the_reference(operator, operator.arguments(dtype, L=1), starts(which), launched)


@every_operator
def test_optional_arguments(operator: Operator, launched: list[str]) -> None:
    for left_out in [(name,) for name in operator.optional] + [operator.optional]:
        arguments = {name: tensor for name, tensor in operator.arguments(L=1).items() if name not in left_out}
        for which in ("none", "some start"):
            assert_as_right_as_the_reference(operator, arguments, starts(which), launched)


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 128, 300])
def test_taps(taps: int, channels: int, launched: list[str]) -> None:
    for which in ("none", "some start"):
        arguments = CONV.arguments(L=1, E=channels, W=taps)
        assert_as_right_as_the_reference(CONV, arguments, starts(which), launched)


@pytest.mark.parametrize("states", [1, 8, 16, 17, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3, 70])
def test_states(states: int, channels: int, launched: list[str]) -> None:
    arguments = SELECTIVE_SCAN.arguments(L=1, E=channels, N=states)
    assert_as_right_as_the_reference(SELECTIVE_SCAN, arguments, starts("some start"), launched)


@pytest.mark.parametrize(
    ("heads", "groups", "channels", "states"),
    [(1, 1, 1, 1), (4, 2, 8, 8), (9, 3, 3, 16), (2, 1, 64, 128), (1, 1, 33, 70), (2, 2, 256, 256)],
)
def test_heads(heads: int, groups: int, channels: int, states: int, launched: list[str]) -> None:
    arguments = SSD.arguments(L=1, H=heads, G=groups, P=channels, N=states)
    assert_as_right_as_the_reference(SSD, arguments, starts("some start"), launched)


@every_operator
def test_dtypes_may_be_mixed(operator: Operator, launched: list[str]) -> None:
    arguments = operator.arguments(L=1)
    halves = {name: arguments[name].bfloat16() for name in list(arguments)[1::2]}
    assert_as_right_as_the_reference(operator, arguments | halves, starts("some start"), launched)


@pytest.mark.parametrize("operator", [SELECTIVE_SCAN, SSD], ids=lambda operator: operator.name)
def test_extreme_deltas(operator: Operator, launched: list[str]) -> None:
    arguments = operator.arguments(L=1)
    arguments["dt"] = torch.linspace(-100, 60, arguments["dt"].numel()).view(arguments["dt"].shape)
    assert_as_right_as_the_reference(operator, arguments, None, launched)


@every_operator
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_was_before_a_boundary_is_not_read(operator: Operator, bad: float) -> None:
    arguments = operator.arguments(L=1)
    carried = operator.optional[-1]
    clean = outputs(operator.native, {**arguments, carried: torch.zeros_like(arguments[carried])}, None)
    found = outputs(operator.native, {**arguments, carried: arguments[carried] * bad}, starts("some start"))
    for name, tensor in found.items():
        assert torch.equal(tensor[[0, 2]], clean[name][[0, 2]])
        assert not tensor[1].isfinite().all()


@every_operator
def test_views_give_the_same_bits(operator: Operator) -> None:
    arguments = operator.arguments(torch.bfloat16, L=1)
    wanted = outputs(operator.native, arguments, starts("some start"))
    along = [name for name, sizes in operator.sizes.items() if "L" in sizes]
    slices = {name: torch.cat([arguments[name]] * copies, dim=1)[:, :1] for copies, name in enumerate(along, start=2)}
    spread = {name: torch.stack([arguments[name]] * 2, dim=-1).flatten(-2)[..., ::2] for name in along}
    for views in (slices, spread):
        found = outputs(operator.native, arguments | views, starts("some start"))
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@every_operator
def test_no_memory_is_read_before_it_is_written(operator: Operator) -> None:
    for rows in (0, 3):
        arguments = operator.arguments(L=1, R=rows)
        wanted = outputs(operator.native, arguments, starts("some start", rows))
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        try:
            found = outputs(operator.native, arguments, starts("some start", rows))
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_offsets_beyond_32_bits() -> None:
    """A row that begins past 2^32 bytes and 2^31 elements, rows that are a stride of 32 bits apart; only the pages they
    touch are ever used."""
    try:
        memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"this machine gives no 4 GB of addresses: {error}")
    for operator, name in ((CONV, "x"), (SELECTIVE_SCAN, "u"), (SSD, "x")):
        arguments = operator.arguments(torch.bfloat16, L=1)
        wanted = outputs(operator.native, arguments, None)
        shape, strides = arguments[name].shape, arguments[name].stride()
        far = memory.as_strided(shape, (2**30, *strides[1:]))
        far.copy_(arguments[name])
        found = outputs(operator.native, arguments | {name: far}, None)
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_gradients_are_those_of_any_length(launched: list[str]) -> None:
    """Forward by the step, backward by the chunks' kernels, which need nothing that forward has kept."""
    arguments = SSD.arguments(L=1)
    yardstick.assert_as_right_as_the_reference(SSD, arguments, starts("some start"))
    assert launched[0] == "step_ssd" and "find_outputs" not in launched
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()} | {
        "boundaries": starts("some start")
    }
    operator = torch.ops.mambatrain.ssd_triton.default
    torch.library.opcheck(operator, tuple(leaves[argument.name] for argument in operator._schema.arguments))


def test_mamba1_takes_no_step_where_gradients_are_wanted(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward needs the states at the entry of chunks, which the other kernel keeps."""
    others: list[str] = []
    monkeypatch.setattr(launching, "launch", lambda program, entry, *rest: others.append(entry))
    monkeypatch.setattr(launching, "count_processors", lambda device: 1)
    native.selective_scan(**{name: tensor.requires_grad_() for name, tensor in SELECTIVE_SCAN.arguments(L=1).items()})
    assert (others, launched) == (["selective_scan_forward"], [])
    native.selective_scan(**SELECTIVE_SCAN.arguments(L=1))
    native.selective_scan(**SELECTIVE_SCAN.arguments(L=2))
    assert (others, launched) == (["selective_scan_forward"] * 2, ["step_selective_scan"])


@every_operator
def test_opcheck(operator: Operator) -> None:
    """Without gradients: Mamba-1's scan takes a step where forward has nothing to keep for them."""
    name = "ssd_triton" if operator is SSD else operator.name
    registered = getattr(torch.ops.mambatrain, name).default
    given: dict[str, Any] = {**operator.arguments(L=1), "boundaries": starts("some start"), "keep_entries": False}
    for values in (given, given | dict.fromkeys((*operator.optional, "boundaries"))):
        arguments = tuple(values[argument.name] for argument in registered._schema.arguments)
        torch.library.opcheck(registered, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compile_traces_a_step() -> None:
    for operator in OPERATORS:
        compiled = torch.compile(operator.native, backend="aot_eager", fullgraph=True)
        arguments = operator.arguments(L=1)
        found, wanted = (outputs(form, arguments, starts("some start")) for form in (compiled, operator.native))
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_a_model_reads_token_by_token_what_it_reads_at_once(block: str, launched: list[str]) -> None:
    """The whole by PyTorch's operators, in fp64; the tokens, one an end token, by these."""
    widths = {"head_dim": 8} if block == "mamba2" else {}
    section = ModelSection(block=block, d_model=16, num_layers=2, vocab_size=32, d_state=8, **widths)
    plain = choose_backend("torch", torch.device("cpu"))
    by_steps = Backend("steps", "interpreted", native.selective_scan, ssd, native.causal_conv)
    model, whole = (LanguageModel(section, backend) for backend in (by_steps, plain))
    initialise(model, section, seed=1)
    whole.load_state_dict(model.state_dict())
    row = torch.tensor([[3, 9, 4, 3, 17, 20, 5, 6]])
    with torch.no_grad():
        wanted, _ = whole.double()(row, row == 3)
        state, found = None, []
        for token in row[0]:
            logits, state = model(token.view(1, 1), token.view(1, 1) == 3, state)
            found.append(logits)
    torch.testing.assert_close(torch.cat(found, dim=1).double(), wanted, rtol=1e-4, atol=1e-5)
    scan = "step_selective_scan" if block == "mamba1" else "step_ssd"
    assert launched == ["step_conv", scan] * 2 * len(row[0])
