import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mambatrain.chats.template import ChatTemplate
from mambatrain.chats.template_files import CHATML, PLAIN
from mambatrain.errors import UserError
from mambatrain.generation.reading import Reader
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.models.state import TextState
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection
from mambatrain.runs.state_file import (
    Chat,
    StateFile,
    blend_states,
    count_numbers,
    facts_of,
    place_state,
    read_state_file,
    shapes_of,
    state_shapes,
    write_state_file,
)
from mambatrain.runs.weights import Weights

VOCABULARY, END = 50, 3
TOKENS = [END, *torch.randint(4, VOCABULARY, (30,), generator=torch.Generator().manual_seed(0)).tolist()]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["mamba1", "mamba2"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    widths = {"head_dim": 8, "d_state": 8, "num_groups": 2} if request.param == "mamba2" else {}
    section = ModelSection(block=request.param, d_model=16, num_layers=2, vocab_size=VOCABULARY, **widths)
    model = LanguageModel(section, choose_backend("torch", CPU))
    initialise(model, section, seed=1)
    torch.nn.init.normal_(model.embedding.weight, generator=torch.Generator().manual_seed(4))  # logits far apart
    return model


@pytest.fixture
def weights(model: LanguageModel) -> Weights:
    return Weights(model.section, {}, None, "runs/a", "a" * 64)


def read(model: LanguageModel, tokens: list[int], start: TextState | None = None) -> Reader:
    reader = Reader(model, END, start)
    reader.add(tokens)
    return reader


def write(file: Path, state: TextState, weights: Weights, dtype: torch.dtype = torch.float32) -> None:
    write_state_file(file, state, facts_of(weights, "t" * 64, "a text", state), dtype)


def load(file: Path, weights: Weights, model: LanguageModel) -> TextState:
    return place_state(read_state_file(file), file, weights, "t" * 64, like=model.head_weight)


def test_make_save_load_and_continue_equals_the_whole_text_at_every_cut(
    model: LanguageModel, weights: Weights, tmp_path: Path
) -> None:
    whole = read(model, TOKENS)
    for cut in range(1, len(TOKENS) + 1):
        write(tmp_path / "x", read(model, TOKENS[:cut]).state(), weights)
        behind = read(model, TOKENS[cut:], start=load(tmp_path / "x", weights, model))
        torch.testing.assert_close(behind.logits(), whole.logits(), rtol=1e-5, atol=1e-5)
        assert (behind.num_tokens, behind.seen_ids) == (len(TOKENS), set(TOKENS))


def test_bf16_is_half_the_size_and_close(model: LanguageModel, weights: Weights, tmp_path: Path) -> None:
    state = read(model, TOKENS).state()
    write(tmp_path / "full", state, weights)
    write(tmp_path / "half", state, weights, torch.bfloat16)
    full, half = (load(tmp_path / name, weights, model) for name in ("full", "half"))
    assert torch.equal(full.hidden, state.hidden)
    for name, width in (("full", 4), ("half", 2)):
        layers = [tensor for key, tensor in load_file(tmp_path / name).items() if key != "seen_ids"]
        assert {tensor.element_size() for tensor in layers} == {width}
    assert not torch.equal(half.hidden, full.hidden)
    for one, other in zip(half.layers, full.layers, strict=True):
        assert one.ssm.dtype == torch.float32
        torch.testing.assert_close(one.ssm, other.ssm, rtol=1 / 256, atol=0)


def test_it_is_refused_with_other_weights_or_another_tokenizer(
    model: LanguageModel, weights: Weights, tmp_path: Path
) -> None:
    file = tmp_path / "x"
    write(file, read(model, TOKENS).state(), weights)
    other = replace(weights, origin="runs/b", digest="b" * 64)
    with pytest.raises(
        UserError, match=r"x is a state of other weights: runs/a \(a{12}\), not runs/b \(b{12}\)"
    ) as told:
        load(file, other, model)
    assert "state make" in str(told.value.hint)
    with pytest.raises(UserError, match=r"another tokenizer \(t{12}, here u{12}\)"):
        place_state(read_state_file(file), file, weights, "u" * 64, like=model.head_weight)


def test_what_is_no_state_file_or_a_damaged_one_is_refused(
    model: LanguageModel, weights: Weights, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(whole, read(model, TOKENS).state(), weights)
    content = whole.read_bytes()

    def refused(written: bytes) -> str:
        broken.write_bytes(written)
        with pytest.raises(UserError) as told:
            read_state_file(broken)
        return told.value.message

    assert "not a whole safetensors file" in refused(content[:-1])
    assert "not a whole safetensors file" in refused(b"")
    assert "was changed" in refused(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    tensors = load_file(whole)
    with safe_open(whole, framework="pt") as opened:
        described = json.loads(opened.metadata()["mambatrain"])
    save_file(tensors, broken)
    assert "broken is no state file" in refused(broken.read_bytes())
    for key in described:
        some = {name: value for name, value in described.items() if name != key}
        save_file(tensors, broken, {"mambatrain": json.dumps(some)})
        assert "broken is no state file" in refused(broken.read_bytes()), key
    save_file(tensors, broken, {"mambatrain": json.dumps({**described, "format": "mambatrain state 9"})})
    assert "another version" in refused(broken.read_bytes())
    with pytest.raises(UserError, match="there is no file"):
        read_state_file(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be read"):
        read_state_file(tmp_path)


def test_only_a_state_file_is_replaced(model: LanguageModel, weights: Weights, tmp_path: Path) -> None:
    state = read(model, TOKENS).state()
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis.txt is there and is no state file"):
        write(tmp_path / "thesis.txt", state, weights)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UserError, match="there is no folder"):
        write(tmp_path / "no" / "x", state, weights)
    write(tmp_path / "x", state, weights)
    write(tmp_path / "x", read(model, TOKENS[:5]).state(), weights)
    assert read_state_file(tmp_path / "x").facts.num_tokens == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt", "x"]


def test_a_conversation_travels_with_its_state(model: LanguageModel, weights: Weights, tmp_path: Path) -> None:
    state = read(model, TOKENS).state()
    chat = Chat([{"role": "user", "content": "naïve 🐈\n"}], unread="\n")
    template = ChatTemplate(CHATML, "mine.jinja", "<s>", "</s>", ("\nUser:",))
    facts = facts_of(weights, "t" * 64, "a chat", state, chat, template)
    write_state_file(tmp_path / "x", state, facts)
    assert read_state_file(tmp_path / "x").facts == facts


def test_blends(model: LanguageModel, weights: Weights, tmp_path: Path) -> None:
    files = []
    for name, tokens in (("one", TOKENS[:9]), ("other", TOKENS[9:])):
        write(tmp_path / name, read(model, tokens).state(), weights)
        files.append(read_state_file(tmp_path / name))
    one, other = files
    for weight in (0.0, 0.3, 1.0):
        state, facts = blend_states(one, other, weight)
        for mixed, a, b in zip(state.layers, one.state.layers, other.state.layers, strict=True):
            torch.testing.assert_close(mixed.ssm, (1 - weight) * a.ssm + weight * b.ssm, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(mixed.window, (1 - weight) * a.window + weight * b.window, rtol=1e-5, atol=1e-6)
        whole = {0.0: one.state, 1.0: other.state}.get(weight)
        assert whole is None or all(map(torch.equal, state.layers[0], whole.layers[0]))
        logits = [Reader(model, END, part).logits() for part in (state, one.state, other.state)]
        torch.testing.assert_close(logits[0], (1 - weight) * logits[1] + weight * logits[2], rtol=1e-4, atol=1e-5)
        assert (state.num_tokens, state.seen_ids, facts.num_tokens) == (len(TOKENS), set(TOKENS), len(TOKENS))
    assert facts.weights_sha256 == weights.digest and facts.template is None
    mine, theirs = (ChatTemplate(source, "mine", "<s>", "</s>") for source in (CHATML, PLAIN))
    for template, kept in ((replace(mine, name="the same elsewhere"), mine), (theirs, None), (None, None)):
        pair = [StateFile(replace(one.facts, template=here), one.state) for here in (mine, template)]
        assert blend_states(*pair, 0.5)[1].template == kept
    for change in ({"weights_sha256": "b" * 64}, {"tokenizer_sha256": "b" * 64}):
        with pytest.raises(UserError, match=r"belong to different (weights|tokenizers)"):
            blend_states(one, StateFile(replace(other.facts, **change), other.state), 0.5)


def test_the_shapes_said_are_those_the_model_makes(model: LanguageModel) -> None:
    assert shapes_of(read(model, TOKENS).state()) == state_shapes(model.section)
    with pytest.raises(AssertionError):
        Reader(model, END).state()


@pytest.mark.parametrize(
    ("section", "num_numbers"),
    [
        (ModelSection(block="mamba1", d_model=768, num_layers=24, vocab_size=50280), 24 * 1536 * 16),
        (ModelSection(block="mamba2", d_model=768, num_layers=24, vocab_size=50280), 24 * 24 * 64 * 128),
    ],
)
def test_the_sizes_of_the_papers_models(section: ModelSection, num_numbers: int) -> None:
    windows, states = count_numbers(state_shapes(section))
    assert states == num_numbers
    assert windows == 24 * 3 * (1536 if section.block == "mamba1" else 1792)
    assert round(states * 4 / 1e6, 1) == (2.4 if section.block == "mamba1" else 18.9)
