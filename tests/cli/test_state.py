"""`state`, and `generate` from and into states, as a user runs them, on random weights of both models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from mambatrain.export.exporting import export_weights
from mambatrain.export.transformers_folder import TRANSFORMERS
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection
from mambatrain.runs.state_file import read_state_file
from mambatrain.runs.weights import Weights

Run = Callable[..., CompletedProcess[str]]
TEXT = "import os\n\n\ndef walk(path):\n    for name in os.listdir(path):\n        yield name\n" * 3


def make_weights(folder: Path, tokenizer: Path, block: str, seed: int) -> Path:
    widths: dict[str, Any] = {"head_dim": 8} if block == "mamba2" else {}
    section = ModelSection(block=block, d_model=16, num_layers=2, vocab_size=512, d_state=8, **widths)  # type: ignore[arg-type]
    model = LanguageModel(section, choose_backend("torch", torch.device("cpu")))
    initialise(model, section, seed)
    torch.nn.init.normal_(model.embedding.weight, generator=torch.Generator().manual_seed(seed))  # logits far apart
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data *= 10  # what was read weighs as much as the last token
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    export_weights(Weights(section, tensors, tokenizer, "a test", "0" * 64), folder, TRANSFORMERS)
    return folder


@pytest.fixture(scope="module", params=["mamba1", "mamba2"])
def weights_of_each_block(
    request: pytest.FixtureRequest, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("export") / "weights"
    return make_weights(folder, tiny_shards / "tokenizer.json", request.param, seed=1)


@pytest.fixture(scope="module")
def weights(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "weights"
    return make_weights(folder, tiny_shards / "tokenizer.json", "mamba1", seed=1)


@pytest.fixture
def succeed(run_mambatrain: Run) -> Run:
    def run(*arguments: Any) -> CompletedProcess[str]:
        result = run_mambatrain(*arguments)
        assert result.returncode == 0, result.stderr
        return result

    return run


def failing(result: CompletedProcess[str]) -> str:
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_document_read_once_is_as_the_document_itself(
    succeed: Run, weights_of_each_block: Path, tmp_path: Path
) -> None:
    weights = weights_of_each_block
    (tmp_path / "text.txt").write_text(TEXT)
    made = succeed("state", "make", weights, "--text", "text.txt", "-o", "x.state.safetensors")
    assert made.stdout == ""
    num_tokens = read_state_file(tmp_path / "x.state.safetensors").facts.num_tokens
    assert f"read {num_tokens - 1} tokens" in made.stderr  # the end token that opens a document is not of the text
    greedy = ["--temperature", "0", "--max-new-tokens", "12", "--repetition-penalty", "1.2"]
    whole = succeed("generate", weights, "--prompt", TEXT, *greedy).stdout
    assert len(whole) > 5
    assert succeed("generate", weights, "--state", "x.state.safetensors", *greedy).stdout == whole

    shown = succeed("state", "show", "x.state.safetensors")
    assert shown.stderr == ""
    facts = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())
    assert facts["text"] == "text.txt"
    assert facts["tokens"].startswith(f"{num_tokens:,}, ")
    assert facts["states"].startswith("2 x 32 x 8, fp32" if "mamba1" in facts["model"] else "2 x 4 x 8 x 8, fp32")


def test_generate_saves_the_state_behind_all_of_the_text(succeed: Run, weights: Path, tmp_path: Path) -> None:
    greedy = ["--temperature", "0", "--max-new-tokens"]
    whole = succeed("generate", weights, "--prompt", "import os", *greedy, "16").stdout
    first = succeed("generate", weights, "--prompt", "import os", *greedy, "6", "--save-state", "a").stdout
    then = succeed("generate", weights, "--state", "a", *greedy, "10", "--save-state", "a").stdout
    assert first[:-1] + then == whole
    assert read_state_file(tmp_path / "a").facts.num_tokens >= 18  # an end token, the prompt, 16 new


def test_reading_on_from_a_state_is_as_reading_all(succeed: Run, weights: Path, tmp_path: Path) -> None:
    cut = TEXT.index("\n    for") + 1  # behind a line end: a place where the tokenizer cuts anyway
    for name, text in (("all", TEXT), ("head", TEXT[: cut - 1]), ("tail", TEXT[cut - 1 :])):
        (tmp_path / name).write_text(text)
    succeed("state", "make", weights, "--text", "all", "-o", "all.state")
    succeed("state", "make", weights, "--text", "head", "-o", "head.state")
    succeed("state", "make", weights, "--text", "tail", "-o", "both.state", "--state", "head.state")
    whole, both = (read_state_file(tmp_path / name) for name in ("all.state", "both.state"))
    assert both.facts.text == "head, tail"
    assert both.facts.num_tokens == whole.facts.num_tokens
    torch.testing.assert_close(both.state.hidden, whole.state.hidden, rtol=1e-5, atol=1e-5)


def test_blending(succeed: Run, run_mambatrain: Run, weights: Path, tiny_shards: Path, tmp_path: Path) -> None:
    for name, text in (("a", TEXT), ("b", "class B:\n    pass\n")):
        (tmp_path / f"{name}.txt").write_text(text)
        succeed("state", "make", weights, "--text", f"{name}.txt", "-o", name, "--dtype", "bf16")
    done = succeed("state", "blend", "a", "b", "--weight", "0.25", "-o", "c")
    assert "0.75 x (a.txt) + 0.25 x (b.txt)" in done.stderr
    one, other, mixed = (read_state_file(tmp_path / name) for name in "abc")
    assert (one.dtype, mixed.dtype) == (torch.bfloat16, torch.float32)
    wanted = 0.75 * one.state.hidden.float() + 0.25 * other.state.hidden.float()
    torch.testing.assert_close(mixed.state.hidden, wanted, rtol=1e-5, atol=1e-6)
    assert succeed("generate", weights, "--state", "c", "--max-new-tokens", "3").stdout

    other_weights = make_weights(tmp_path / "others", tiny_shards / "tokenizer.json", "mamba1", seed=2)
    succeed("state", "make", other_weights, "--text", "a.txt", "-o", "d")
    told = failing(run_mambatrain("state", "blend", "a", "d", "--weight", "0.5", "-o", "e"))
    assert "the two states belong to different weights" in told
    assert not (tmp_path / "e").exists()
    told = failing(run_mambatrain("generate", weights, "--state", "d"))
    assert f"d is a state of other weights: {other_weights} (" in told and "hint: " in told


def test_mistakes(run_mambatrain: Run, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "text.txt").write_text("text")
    make = ["state", "make", weights, "--text"]
    assert "latin.txt is not UTF-8: byte 2" in failing(run_mambatrain(*make, "latin.txt", "-o", "x"))
    assert "--text nowhere is no file" in failing(run_mambatrain(*make, "nowhere", "-o", "x"))
    assert "text.txt is there and is no state file" in failing(run_mambatrain(*make, "text.txt", "-o", "text.txt"))
    assert "there is no folder no" in failing(run_mambatrain(*make, "text.txt", "-o", "no/x"))
    assert "is not a whole safetensors file" in failing(run_mambatrain("state", "show", "text.txt"))
    assert not (tmp_path / "x").exists()
    usage = run_mambatrain("state", "blend", "a", "b", "--weight", "1.5", "-o", "c")
    assert usage.returncode == 2 and "'--weight': 1.5 is not from 0 to 1" in usage.stderr


def test_an_empty_text_is_a_document_of_its_opening_alone(succeed: Run, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    succeed("state", "make", weights, "--text", "empty.txt", "-o", "x")
    greedy = ["--temperature", "0", "--max-new-tokens", "5"]
    from_state = succeed("generate", weights, "--state", "x", "--prompt", "def ", *greedy).stdout
    assert from_state == succeed("generate", weights, "--prompt", "def ", *greedy).stdout
