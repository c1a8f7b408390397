"""Tokens read one by one in memory of their own: all but CUDA's recording, in whose place the step itself is run again.

`tests/gpu/test_decoding.py` records it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mambatrain.cli import open_model
from mambatrain.generation import token_step
from mambatrain.generation.generate import generate
from mambatrain.generation.reading import Reader
from mambatrain.generation.sampling import SamplingSettings
from mambatrain.generation.token_step import TokenStep, why_not_recorded
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.models.state import TextState
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection

VOCABULARY, END = 50, 3
PROMPT = [END, 7, 9, 11]
TOKENS = [12, 5, END, 8, 9, 30]


@pytest.fixture(scope="module", params=["mamba1", "mamba2"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    widths = {"head_dim": 8} if request.param == "mamba2" else {}
    section = ModelSection(block=request.param, d_model=16, num_layers=2, vocab_size=VOCABULARY, d_state=8, **widths)
    model = LanguageModel(section, choose_backend("auto", torch.device("cpu")))
    initialise(model, section, seed=1)
    return model


@pytest.fixture(autouse=True)
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is recorded is run again; gives a list that has an entry for each time."""
    times: list[int] = []

    def record(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        def replay() -> None:
            times.append(1)
            run()

        return replay

    monkeypatch.setattr(token_step, "record", record)
    return times


def tensors(state: TextState) -> list[Tensor]:
    return [state.hidden, *(tensor for layer in state.layers for tensor in layer)]


def assert_same(found: TextState, wanted: TextState) -> None:
    assert (found.num_tokens, found.seen_ids) == (wanted.num_tokens, wanted.seen_ids)
    for ours, theirs in zip(tensors(found), tensors(wanted), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def read(reader: Reader, tokens: list[int]) -> list[TextState]:
    states = []
    for token in tokens:
        reader.add([token])
        states.append(reader.state())
    return states


@pytest.mark.parametrize("boundary", [END, None])
def test_each_state_is_the_models_to_the_bit_and_stays(
    model: LanguageModel, boundary: int | None, replays: list[int]
) -> None:
    """A token in the middle starts a document, where there is a boundary."""
    step = TokenStep(model, boundary)
    readers = [Reader(model, boundary, None, step), Reader(model, boundary)]
    for reader in readers:
        reader.add(PROMPT)
        reader.state()
    assert replays == []
    found, wanted = (read(reader, TOKENS) for reader in readers)
    assert len(replays) == len(TOKENS)
    for ours, theirs in zip(found, wanted, strict=True):  # only now: later tokens have changed none of them
        assert_same(ours, theirs)
    separate = Reader(model, boundary)
    separate.add(TOKENS[TOKENS.index(END) :])
    close = torch.allclose(found[-1].hidden, separate.state().hidden, atol=1e-5)
    assert close == (boundary is not None)


def test_one_step_serves_many_readers_in_turn(model: LanguageModel) -> None:
    step = TokenStep(model, END)
    states = []
    for shared in (step, None):
        one, other = (Reader(model, END, None, shared) for _ in range(2))
        one.add(PROMPT)
        other.add(PROMPT[:2])
        turns = [read(reader, [token]) for token in TOKENS for reader in (one, other)]
        again = Reader(model, END, turns[2][0], shared)  # back to an earlier place
        states.append([*(turn[0] for turn in turns), *read(again, TOKENS)])
    for ours, theirs in zip(*states, strict=True):
        assert_same(ours, theirs)


def test_a_state_is_copied_in_where_it_is_not_there_already(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TokenStep(model, END)
    reader = Reader(model, END, None, step)
    reader.add(PROMPT)
    copy_in, copies = step._copy_in, []
    monkeypatch.setattr(step, "_copy_in", lambda layers: (copies.append(1), copy_in(layers)))
    read(reader, TOKENS)
    assert len(copies) == len(TOKENS)  # the first is read with the prompt, whose state is copied in for the second
    copies.clear()
    read(Reader(model, END, reader.state(), step), TOKENS)
    assert len(copies) == len(TOKENS)  # by the step itself: the state was there
    copies.clear()
    other = Reader(model, END)
    other.add(PROMPT)
    read(Reader(model, END, other.state(), step), TOKENS)
    assert len(copies) == 1 + len(TOKENS)


def test_an_interrupt_in_the_middle_loses_no_token(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    step = TokenStep(model, END)
    reader, wanted = Reader(model, END, None, step), Reader(model, END)
    for one in (reader, wanted):
        one.add(PROMPT)
        read(one, TOKENS[:3])
    replay = step._replay

    def interrupted() -> None:
        replay()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, "_replay", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read(reader, TOKENS[3:4])
    wanted.add(TOKENS[3:4])
    assert_same(reader.state(), wanted.state())


def test_generation_is_the_same_with_and_without(model: LanguageModel, replays: list[int]) -> None:
    drawn = []
    for step in (TokenStep(model, END), None):
        reader = Reader(model, END, None, step)
        reader.add(PROMPT)
        how: dict[str, Any] = {"end_of_document": END, "vocab_size": VOCABULARY, "max_new_tokens": 20}
        drawn.append(list(generate(reader, **how, settings=SamplingSettings(seed=2, repetition_penalty=1.1))))
    assert drawn[0] == drawn[1]
    assert len(replays) >= len(drawn[0]) - 1 > 3


def test_why_not(model: LanguageModel) -> None:
    assert why_not_recorded(model) == "the device is cpu"
    on_cuda: Any = SimpleNamespace(head_weight=SimpleNamespace(device=torch.device("cuda")), backend=model.backend)
    for name in ("torch", "reference"):
        on_cuda.backend = choose_backend(name, torch.device("cpu"))
        assert why_not_recorded(on_cuda) == f"only native kernels are recorded, and these are {name}"


def refuse(*_: object) -> TokenStep:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")


@pytest.mark.parametrize(
    ("backend", "made", "said"),
    [
        ("native", lambda *_: "a step", "decoding by a CUDA graph, one for each token\n"),
        (
            "native",
            refuse,
            "decoding without a CUDA graph, which is slower: CUDA refuses to record one (CUDA error: operation not "
            "permitted when stream is capturing)\n",
        ),
        (
            "torch",
            refuse,
            "decoding without a CUDA graph, which is slower: only native kernels are recorded, and these are torch\n",
        ),
    ],
)
def test_what_is_said(
    backend: str,
    made: Callable[..., Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(token_step, "TokenStep", made)
    weight = SimpleNamespace(device=torch.device("cuda"))
    opened: Any = SimpleNamespace(model=SimpleNamespace(head_weight=weight, backend=SimpleNamespace(name=backend)))
    step = open_model.record_step(opened, END)
    assert (step is not None) == said.startswith("decoding by")
    assert capsys.readouterr() == ("", said)


def test_on_a_cpu_nothing_is_said(model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    opened: Any = SimpleNamespace(model=model)
    assert open_model.record_step(opened, END) is None
    assert capsys.readouterr() == ("", "")
