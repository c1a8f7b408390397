"""Runs that learn from preference pairs: they begin at ln 2, their margin grows, and their references are kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mambatrain.adapters.open_weights import open_weights
from mambatrain.data.open_tokens import open_tokens
from mambatrain.data.training_data import open_training_data
from mambatrain.errors import UserError
from mambatrain.evaluation.held_out_text import find_held_out_text
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import read_recipe
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.runs.folder import read_log
from mambatrain.runs.weights import build_model, read_weights
from mambatrain.training import references
from mambatrain.training.assemble import Where
from mambatrain.training.sharding import refuse_with_shards
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

Write = Callable[..., Path]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
PAIRS = [{"prompt": f"{a} {b}?", "chosen": f"yes, {b}", "rejected": f"no, {a}"} for a in WORDS for b in WORDS]


@pytest.fixture
def write_recipe(write_tiny_recipe: Write, tmp_path: Path) -> Write:
    """A recipe of pairs for the weights of `base`."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))

    def write(**changes: Any) -> Path:
        chats = {"files": [str(tmp_path / "pairs.jsonl")], "format": "preference", "held_out": 0.2}
        data = {"chats": chats, "row_tokens": 80}
        return write_tiny_recipe(**{"model": None, "data": data, "preferences": {}, **changes})

    return write


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Block -> its run, trained once for all tests."""
    return {}


@pytest.fixture
def base(bases: dict[str, Path], write_tiny_recipe: Write, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def make(block: str = "mamba1") -> Path:
        if block not in bases:
            bases[block] = tmp_path_factory.mktemp("bases") / block
            own = {"model__block": block, "model__head_dim": 16} if block == "mamba2" else {}
            train(write_tiny_recipe(**own, training__total_steps=3), bases[block])
        return bases[block]

    return make


def train(
    recipe: Path, run: Path, weights: Path | None = None, stop: StopRequest | None = None, kernels: str = "torch"
) -> list[dict[str, Any]]:
    start = None if weights is None else open_weights(str(weights))
    read = read_recipe(str(recipe), model=None if start is None else start.section)
    where = Where(device="cpu", kernels=kernels, quiet=True)
    assert run_training(read, run, where, "if-possible", stop or StopRequest(), start) == (0 if stop is None else 75)
    return read_log(run / "log.jsonl")


def of(event: str, log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in log if line["event"] == event]


def kept_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("references-*.safetensors"))


@pytest.mark.parametrize(
    ("block", "kernels", "normalised"),
    [("mamba1", "auto", False), ("mamba1", "torch", True), ("mamba2", "torch", False)],
)
def test_the_margin_grows_from_0(
    block: str, kernels: str, normalised: bool, base: Any, write_recipe: Write, tmp_path: Path
) -> None:
    preferences = {"beta": 2.0 if normalised else 0.5, "length_normalised": normalised}
    log = train(write_recipe(preferences=preferences), tmp_path / "run", base(block), kernels=kernels)
    steps, held_out = of("step", log), of("held_out", log)
    assert (steps[0]["loss"], held_out[0]["held_out_loss"]) == (pytest.approx(math.log(2.0), rel=1e-5),) * 2
    assert abs(held_out[0]["held_out_reward_margin"]) < 1e-4
    margins = [line["held_out_reward_margin"] for line in held_out]
    assert margins == sorted(margins) and margins[-1] > 0.3
    assert held_out[-1]["held_out_loss"] < held_out[0]["held_out_loss"]
    assert held_out[-1]["held_out_reward_accuracy"] == 1.0
    for line in (*steps, *({key.removeprefix("held_out_"): line[key] for key in line} for line in held_out)):
        assert line["reward_margin"] == pytest.approx(line["rewards_chosen"] - line["rewards_rejected"], abs=1e-9)
    assert held_out[-1]["held_out_bits_per_byte"] is None
    assert (tmp_path / "run" / "loss.png").is_file()


def test_a_run_that_was_stopped_goes_on_to_the_bit_and_computes_no_reference_again(
    base: Any, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe()
    whole = train(recipe, tmp_path / "whole", base())
    stop = StopRequest()
    write = references.write_references
    monkeypatch.setattr(references, "write_references", lambda *given: (write(*given), setattr(stop, "asked", True)))
    train(recipe, tmp_path / "run", base(), stop)
    monkeypatch.setattr(references, "_compute", lambda *_: pytest.fail("the reference was computed again"))
    again = train(recipe, tmp_path / "run", base())
    clock = {"seconds", "data_seconds", "tokens_per_second", "model_flops_utilisation", "memory_bytes"}
    assert [{key: line[key] for key in line.keys() - clock} for line in again] == [
        {key: line[key] for key in line.keys() - clock} for line in whole
    ]
    ends = [list_checkpoints(tmp_path / name)[-1] for name in ("run", "whole")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()


def test_references_are_of_the_starting_weights_and_shared_by_their_runs(
    base: Any, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = {"references": str(tmp_path / "kept")}
    recipe = write_recipe(preferences=together, training__total_steps=1)
    first = train(recipe, tmp_path / "one", base())
    (file,) = kept_in(tmp_path / "kept")
    # They are what the model that opens from the base gives, each conversation alone.
    found = {split: values.clone() for split, values in load_file(file).items()}  # the file will be changed
    model = build_model(read_weights(str(base())), choose_backend("torch", torch.device("cpu")), torch.device("cpu"))
    tokens = open_tokens(tmp_path / "one" / "chats")
    for split, shard in tokens.shards.items():
        assert shard.counted is not None and len(found[split]) == shard.num_documents
        for number in range(0, shard.num_documents, 5):
            ids, start = torch.tensor(shard.document(number).astype("int64")), int(shard.document_starts[number])
            counted = torch.tensor(shard.counted[start : start + len(ids)])
            with torch.no_grad():
                log_p = torch.log_softmax(model(ids[None])[0][0, :-1].double(), dim=-1).gather(1, ids[1:, None])[:, 0]
            assert float(found[split][number]) == pytest.approx(float(log_p[counted[1:]].sum()), rel=1e-5)
    # A file that was changed is not believed.
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert of("held_out", train(recipe, tmp_path / "two", base())) == of("held_out", first)
    assert load_file(file)["train"].equal(found["train"])
    with monkeypatch.context() as patch:
        patch.setattr(references, "_compute", lambda *_: pytest.fail("the reference was computed again"))
        assert of("held_out", train(recipe, tmp_path / "three", base())) == of("held_out", first)
    train(recipe, tmp_path / "four", tmp_path / "one")  # other weights
    assert len(kept_in(tmp_path / "kept")) == 2
    with (tmp_path / "pairs.jsonl").open("a") as file_of_pairs:  # other pairs
        file_of_pairs.write(json.dumps({"prompt": "x", "chosen": "y", "rejected": "z"}) + "\n")
    train(recipe, tmp_path / "five", base())
    assert len(kept_in(tmp_path / "kept")) == 3


def test_a_pass_that_is_interrupted_leaves_no_file(
    base: Any, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = write_recipe(training__total_steps=1), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stopped(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(references, "_log_probabilities", stopped)
        train(recipe, run, base())
    assert not list(run.glob("chats/*references*"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # what is killed cleans nothing up
        patch.setattr("mambatrain.files.fsync_folder", stopped)
        patch.setattr("os.fsync", stopped)
        train(recipe, run, base())
    assert not kept_in(run / "chats")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[:20]))
    train(recipe, run, base())  # other pairs: the folder with what the last life left is replaced
    assert len(kept_in(run / "chats")) == 1


def test_the_reference_of_an_adapter_is_what_it_stands_on(base: Any, write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe(adapter={"rank": 4, "alpha": 8.0}, preferences={"beta": 0.5})
    log = train(recipe, tmp_path / "run", base())
    held_out = of("held_out", log)
    assert held_out[0]["held_out_loss"] == pytest.approx(math.log(2.0), rel=1e-5)
    assert held_out[-1]["held_out_reward_margin"] > 0.1
    whole = tmp_path / "whole"
    train(write_recipe(training__total_steps=1), whole, base())
    one, other = (load_file(kept_in(run / "chats")[0]) for run in (tmp_path / "run", whole))
    assert one["train"].equal(other["train"])


def test_what_does_not_go_with_pairs_is_refused(base: Any, write_recipe: Write, tmp_path: Path) -> None:
    recipe, run = write_recipe(training__total_steps=1), tmp_path / "run"
    section = read_weights(str(base())).section
    read = read_recipe(str(recipe), model=section)
    with pytest.raises(UserError, match="learns from preferences, which needs weights for its reference"):
        run_training(read, tmp_path / "none", Where("cpu", "torch", quiet=True), "if-possible", StopRequest())
    with pytest.raises(UserError, match="--shard full does not go with preferences"):
        refuse_with_shards(read, "full")
    train(recipe, run, base())
    with pytest.raises(UserError, match="chats holds preference pairs: half of its answers are those that were"):
        find_held_out_text(str(run), None)
    shutil.copytree(run / "chats", tmp_path / "tokens")
    data = read.data.model_copy(update={"chats": None, "shards": str(tmp_path / "tokens")})
    with pytest.raises(UserError, match="tokens holds preference pairs: half of its answers"):
        open_training_data(read.model_copy(update={"preferences": None, "data": data}), may_write=False)
