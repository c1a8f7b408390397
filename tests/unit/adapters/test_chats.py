"""Adapters and trained states on conversations: the loss by hand, what is cut, and the template that goes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted_models import adapted, base_model, section_of
from tokenizers import Tokenizer

from mambatrain.adapters.open_weights import open_weights
from mambatrain.chats.open_chats import open_chats
from mambatrain.chats.template_files import own_template
from mambatrain.data.batches import IGNORED_TARGET
from mambatrain.data.document_rows import DocumentRows
from mambatrain.data.tokenizer import load_tokenizer
from mambatrain.data.training_data import open_training_data
from mambatrain.errors import UserError
from mambatrain.evaluation.held_out import measure_held_out
from mambatrain.evaluation.held_out_text import find_held_out_text
from mambatrain.generation.reading import Reader
from mambatrain.models.state import TextState
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import AdapterSection, read_recipe
from mambatrain.runs.folder import read_log
from mambatrain.runs.state_file import read_state_file
from mambatrain.runs.weights import build_model, read_weights
from mambatrain.training.assemble import Where
from mambatrain.training.objective import NextTokenLoss
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

Write = Callable[..., Path]
END = "<|endoftext|>"
CPU = torch.device("cpu")
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
CHATS = [[f"say {a}", f"{b} {a}", f"and {b}", f"{a} {b} {a}"] for a in WORDS for b in WORDS[:4]]
MINE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' }}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_chats(file: Path, chats: list[list[str]]) -> Path:
    roles = ("user", "assistant")
    rows = [{"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(chat)]} for chat in chats]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def write_recipe(write_tiny_recipe: Write, tiny_shards: Path, tmp_path: Path) -> Write:
    """A recipe of conversations; `chats__field=value` changes their section."""

    def write(**changes: Any) -> Path:
        of_chats = {name[7:]: changes.pop(name) for name in list(changes) if name.startswith("chats__")}
        files = [str(write_chats(tmp_path / "chats.jsonl", CHATS))]
        section = {"files": files, "tokenizer": str(tiny_shards / "tokenizer.json"), "template": "plain", **of_chats}
        own = {"data__shards": None, "data__chats": section, "data__row_tokens": 128}
        return write_tiny_recipe(**own | changes)

    return write


def train(recipe: Path, run: Path, weights: str | Path | None = None) -> list[dict[str, Any]]:
    start = None if weights is None else open_weights(str(weights))
    read = read_recipe(str(recipe), model=None if start is None else start.section)
    where = Where(device="cpu", kernels="auto", quiet=True)
    assert run_training(read, run, where, "if-possible", StopRequest(), start) == 0
    return read_log(run / "log.jsonl")


def held_out_losses(log: list[dict[str, Any]]) -> list[float]:
    return [line["held_out_loss"] for line in log if line["event"] == "held_out"]


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_the_loss_of_conversations_behind_a_trained_state_is_the_one_computed_by_hand(
    block: str, write_recipe: Write, tiny_shards: Path, tmp_path: Path
) -> None:
    """Token by token from the state, for each conversation alone; what counts is spelled out below."""
    adapter = {"kind": "state", "window": True}
    recipe = read_recipe(str(write_recipe(adapter=adapter, chats__held_out=0.2, evaluation__max_tokens=10_000)))
    open_chats(recipe, None, tmp_path / "chats")
    data = open_training_data(recipe, chats=tmp_path / "chats")
    rows = data.order.stages[0].sources[0].windows
    assert isinstance(rows, DocumentRows) and (rows.num_windows, rows.num_cut) == (19, 0)
    model = base_model(section_of(block, vocab_size=512), dtype=torch.float64)
    _, start = adapted(model, AdapterSection(kind="state", window=True))
    assert start is not None
    batch = rows.rows(np.arange(19))
    assert batch.boundaries[:, 0].all()
    loss = NextTokenLoss(model, start)(*batch).item()
    assert data.held_out is not None
    measured = measure_held_out(model, data.held_out.micro_batches(3), None, start.layers())

    tokenizer = Tokenizer.from_file(str(tiny_shards / "tokenizer.json"))  # names of special tokens are these
    sums = {True: 0.0, False: 0.0}
    counts = {True: 0, False: 0}
    rows_shown = {tuple(row) for row in batch.tokens.tolist()}
    for ask, answer, again, last in CHATS:
        parts = [f"{END}User:\n{ask}\n\nAssistant:\n", f"{answer}{END}", f"\n\nUser:\n{again}\n\nAssistant:\n"]
        parts += [f"{last}{END}", "\n\n"]
        text, ids, counted = "".join(parts), [], []
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ends = np.cumsum([len(part) for part in parts])
        for token, (first, _) in zip(encoding.ids, encoding.offsets, strict=True):
            ids.append(token)
            counted.append(int(np.searchsorted(ends, first, side="right")) % 2 == 1)
        with torch.no_grad():
            reader = Reader(model, None, TextState(start.layers(), None, 0, frozenset()))
            nats = 0.0
            for place in range(len(ids) - 1):
                reader.add([ids[place]])
                if counted[place + 1]:
                    nats -= float(torch.log_softmax(reader.logits(), -1)[ids[place + 1]])
        trained = (*ids[:-1], *[0] * (129 - len(ids))) in rows_shown
        sums[trained] += nats
        counts[trained] += sum(counted)
    assert (counts[True], counts[False]) == (int((batch.targets != IGNORED_TARGET).sum()), measured.num_targets)
    assert loss == pytest.approx(sums[True], rel=1e-9)
    assert measured.nats == pytest.approx(sums[False], rel=1e-9)
    assert NextTokenLoss(model)(*batch).item() != pytest.approx(sums[True], rel=1e-6)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> dict[str, Path]:
    """Block -> a run on text."""
    import yaml

    runs = {}
    for block, own in (("mamba1", {}), ("mamba2", {"head_dim": 16})):
        folder = tmp_path_factory.mktemp(block)
        content = {
            "model": {"block": block, "d_model": 16, "num_layers": 2, "vocab_size": 512, "d_state": 8, **own},
            "data": {"shards": str(tiny_shards), "row_tokens": 32},
            "training": {"rows_per_step": 4, "total_steps": 12, "precision": "fp32"},
            "optimizer": {"learning_rate": 0.01},
            "evaluation": {"max_tokens": 400},
        }
        (folder / "base.yaml").write_text(yaml.safe_dump(content))
        train(folder / "base.yaml", folder / "base")
        runs[block] = folder / "base"
    return runs


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
@pytest.mark.parametrize("kind", ["lora", "state"])
def test_on_conversations_it_learns_and_carries_their_template(
    block: str, kind: str, bases: dict[str, Path], write_recipe: Write, tmp_path: Path
) -> None:
    (tmp_path / "mine.jinja").write_text(MINE)
    recipe = write_recipe(
        model=None,
        adapter={"kind": kind},
        chats__template=str(tmp_path / "mine.jinja"),
        optimizer__learning_rate={"lora": 0.02, "state": 0.1}[kind],
        training__total_steps=20,
    )
    losses = held_out_losses(train(recipe, tmp_path / "run", bases[block]))
    assert losses[-1] < losses[0] - 0.05
    if kind == "state":
        template = read_state_file(tmp_path / "run" / "tuned.state.safetensors").facts.template
        assert template is not None and (template.source, template.eos_token) == (MINE, END)
        return
    moved = (tmp_path / "run" / "adapter").rename(tmp_path / "adapter")
    for where in (tmp_path / "run", moved):
        weights = open_weights(str(where), str(bases[block]))
        assert weights.tokenizer_file is not None
        template = own_template(load_tokenizer(weights.tokenizer_file))
        assert template is not None and template.source == MINE


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_a_conversation_that_is_longer_than_a_row_is_cut_and_counted_or_refused(
    kind: str, bases: dict[str, Path], write_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"model": None, "adapter": {"kind": kind}, "data__row_tokens": 48, "training__total_steps": 1}
    train(write_recipe(**short), tmp_path / "run", bases["mamba1"])
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "lost their ends" in line]
    assert " conversations were longer than a row of 48 and lost their ends with " in said
    with pytest.raises(UserError, match=r"chats.jsonl:\d+ has \d+ tokens, and a row shows 49"):
        train(write_recipe(**short, chats__too_long="refuse"), tmp_path / "refused", bases["mamba1"])
    # Tokenized for longer rows, they would be cut unseen, and the held-out loss be about other tokens.
    wide = tmp_path / "wide"
    open_chats(read_recipe(str(write_recipe())), None, wide)
    longer = r"wide holds conversations of up to \d+ tokens, and a row shows 49"
    with pytest.raises(UserError, match=longer):
        train(write_recipe(**short, data__shards=str(wide), data__chats=None), tmp_path / "x", bases["mamba1"])
    with pytest.raises(UserError, match=longer):
        find_held_out_text(str(bases["mamba1"]), wide, 48, document_rows=kind == "state")


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_evaluated_again_a_trained_state_has_the_loss_of_the_log(
    block: str, bases: dict[str, Path], write_recipe: Write, tmp_path: Path
) -> None:
    recipe = write_recipe(model=None, adapter={"kind": "state"}, optimizer__learning_rate=0.1)
    losses = held_out_losses(train(recipe, tmp_path / "run", bases[block]))
    text = find_held_out_text(str(bases[block]), tmp_path / "run" / "chats", 128, 400, document_rows=True)
    model = build_model(read_weights(str(bases[block])), choose_backend("torch", CPU), CPU)
    start = read_state_file(tmp_path / "run" / "tuned.state.safetensors").state.layers
    measured = measure_held_out(model, text.batches.micro_batches(2), None, start)
    assert measured.nats_per_token == pytest.approx(losses[-1], rel=1e-5)
