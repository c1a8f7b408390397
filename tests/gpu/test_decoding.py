"""One token at a time on a device: step kernels and CUDA graph. Not yet run on a GPU: nobody here has had one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yardstick
from torch import Tensor
from yardstick import CONV, SELECTIVE_SCAN, Operator

from mambatrain.generation.generate import generate
from mambatrain.generation.reading import Reader
from mambatrain.generation.sampling import SamplingSettings
from mambatrain.generation.token_step import TokenStep, why_not_recorded
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.models.state import TextState
from mambatrain.ops.backends import choose_backend
from mambatrain.ops.triton import steps
from mambatrain.ops.triton.ssd import FLOATS, ssd
from mambatrain.recipe import ModelSection

CUDA = torch.device("cuda")
SSD = replace(yardstick.SSD, native=ssd)
OPERATORS = (CONV, SELECTIVE_SCAN, SSD)
STEPS = {"causal_conv": "step_conv", "selective_scan": "step_selective_scan", "ssd": "step_ssd"}
VOCABULARY, END = 128, 3
PROMPT, TOKENS = [END, 7, 9, 11, 100], [12, 5, 8, END, 9, 30, 31, 32]
SECTIONS = {
    "mamba1": ModelSection(block="mamba1", d_model=64, num_layers=3, vocab_size=VOCABULARY),
    "mamba2": ModelSection(block="mamba2", d_model=64, num_layers=3, vocab_size=VOCABULARY, head_dim=32, d_state=128),
}
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
every_block = pytest.mark.parametrize("block", SECTIONS)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the steps that ran."""
    names: list[str] = []

    def recording(name: str) -> Callable[..., None]:
        run = getattr(steps, name)

        def record(*arguments: object) -> None:
            names.append(name)
            run(*arguments)

        return record

    for name in STEPS.values():
        monkeypatch.setattr(steps, name, recording(name))
    yield names


def assert_as_right_as_the_reference(operator: Operator, dtype: torch.dtype, taken: list[str], **sizes: int) -> None:
    for starts in (None, [True, False, True]):
        boundaries = None if starts is None else torch.tensor(starts, device=CUDA)[:, None]
        arguments = {name: tensor.to(CUDA) for name, tensor in operator.arguments(dtype, L=1, **sizes).items()}
        doubles = {name: tensor.double() for name, tensor in arguments.items()}
        truth = operator.reference(**doubles, boundaries=boundaries)
        plain = operator.reference(**arguments, boundaries=boundaries)
        taken.clear()
        found = operator.native(**arguments, boundaries=boundaries)
        assert taken == [STEPS[operator.name]]
        for ours, theirs, wanted in zip(found, plain, truth, strict=True):
            assert (ours.shape, ours.dtype) == (wanted.shape, theirs.dtype)
            lost = float((theirs.double() - wanted).abs().max())
            allowed = 2 * lost + 16 * yardstick.ROUNDING * float(wanted.abs().max())
            assert float((ours.double() - wanted).abs().max()) <= allowed
        assert all(map(torch.equal, operator.native(**arguments, boundaries=boundaries), found))


@every_dtype
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_conv(taps: int, dtype: torch.dtype, taken: list[str]) -> None:
    for channels in (1, 17, 1536, 5121):
        assert_as_right_as_the_reference(CONV, dtype, taken, E=channels, W=taps)


@every_dtype
@pytest.mark.parametrize("states", [1, 8, 16, 17, 64, 128, 256])
def test_selective_scan(states: int, dtype: torch.dtype, taken: list[str]) -> None:
    for channels in (1, 17, 1536):
        assert_as_right_as_the_reference(SELECTIVE_SCAN, dtype, taken, E=channels, N=states)


@every_dtype
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (24, 1), (9, 3)])
@pytest.mark.parametrize(("channels", "states"), [(1, 1), (8, 8), (64, 128), (33, 70), (256, 256)])
def test_ssd(heads: int, groups: int, channels: int, states: int, dtype: torch.dtype, taken: list[str]) -> None:
    assert_as_right_as_the_reference(SSD, dtype, taken, H=heads, G=groups, P=channels, N=states)


@every_operator
def test_opcheck(operator: Operator) -> None:
    """With gradients, too; Mamba-1's scan then keeps what its backward needs and takes no step."""
    name = "ssd_triton" if operator is SSD else operator.name
    registered = getattr(torch.ops.mambatrain, name).default
    for wanted in (False, True):
        given = {name: tensor.to(CUDA).requires_grad_(wanted) for name, tensor in operator.arguments(L=1).items()} | {
            "boundaries": torch.tensor([[True], [False], [True]], device=CUDA),
            "keep_entries": wanted,
        }
        torch.library.opcheck(registered, tuple(given[argument.name] for argument in registered._schema.arguments))


@pytest.fixture
def model(block: str) -> LanguageModel:
    model = LanguageModel(SECTIONS[block], choose_backend("native", CUDA)).to(CUDA)
    initialise(model, SECTIONS[block], seed=1)
    return model


def tensors(state: TextState) -> list[Tensor]:
    return [state.hidden, *(tensor for layer in state.layers for tensor in layer)]


def read_one_by_one(reader: Reader) -> list[TextState]:
    reader.add(PROMPT)
    states = [reader.state()]
    for token in TOKENS:
        reader.add([token])
        states.append(reader.state())
    return states


@every_block
@pytest.mark.parametrize("boundary", [END, None])
def test_the_graph_computes_what_the_model_does_to_the_bit(model: LanguageModel, boundary: int | None) -> None:
    assert why_not_recorded(model) is None
    step = TokenStep(model, boundary)
    wanted = read_one_by_one(Reader(model, boundary))
    for found in (read_one_by_one(Reader(model, boundary, None, step)) for _ in range(2)):
        for ours, theirs in zip(found, wanted, strict=True):
            assert all(map(torch.equal, tensors(ours), tensors(theirs)))


@every_block
def test_tokens_one_by_one_are_the_whole(model: LanguageModel) -> None:
    """The step kernels against those of a sequence; a document starts in the middle."""
    whole = Reader(model, END)
    whole.add(PROMPT + TOKENS)
    last = read_one_by_one(Reader(model, END, None, TokenStep(model, END)))[-1]
    for ours, theirs in zip(tensors(last), tensors(whole.state()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@every_block
def test_generation_draws_the_same_with_and_without(model: LanguageModel) -> None:
    drawn = []
    for step in (TokenStep(model, END), None):
        reader = Reader(model, END, None, step)
        reader.add(PROMPT)
        new = generate(
            reader, end_of_document=END, vocab_size=VOCABULARY, max_new_tokens=50, settings=SamplingSettings(seed=1)
        )
        drawn.append(list(new))
    assert drawn[0] == drawn[1]


@every_block
def test_memory_does_not_grow(model: LanguageModel) -> None:
    reader = Reader(model, END, None, TokenStep(model, END))
    reader.add(PROMPT)
    held = []
    for count in range(300):
        reader.add([4 + count % 50])
        reader.logits()
        held.append(torch.cuda.memory_allocated())
    assert max(held[100:]) == max(held[10:100])


def test_the_command_says_what_it_does(
    run_mambatrain: Callable[..., subprocess.CompletedProcess[str]],
    write_tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    recipe = write_tiny_recipe(training__total_steps=4)
    trained = run_mambatrain("pretrain", recipe, "--run", tmp_path / "run", "--gpus", "1")
    assert trained.returncode == 0, trained.stderr
    texts = {}
    for kernels, said in (
        ("native", "decoding by a CUDA graph, one for each token"),
        (
            "torch",
            "decoding without a CUDA graph, which is slower: only native kernels are recorded, and these are torch",
        ),
    ):
        options = ["--prompt", "", "--max-new-tokens", "8", "--temperature", "0", "--kernels", kernels]
        done = run_mambatrain("generate", tmp_path / "run", *options)
        assert done.returncode == 0, done.stderr
        assert said in done.stderr.splitlines()
        texts[kernels] = done.stdout
    assert texts["native"] == texts["torch"]
