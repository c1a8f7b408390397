"""Which tokens of a conversation count: transformers' own count, and gradients that are exactly zero elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mambatrain.chats.chat_corpus import tokenize_chats
from mambatrain.chats.counted import render_counted
from mambatrain.chats.encode import ChatEncoder
from mambatrain.chats.open_chats import chat_tokenizer
from mambatrain.chats.template import ChatTemplate
from mambatrain.chats.template_files import CHATML, PLAIN, RAW, SHIPPED, find_template
from mambatrain.data.batches import IGNORED_TARGET, MicroBatch
from mambatrain.data.open_tokens import open_tokens
from mambatrain.data.packing import PackedWindows, open_packing
from mambatrain.data.tokenizer import load_tokenizer, with_special_tokens
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ChatSection, ModelSection

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
OASST = DATA / "sft" / "oasst1_en_messages.jsonl"
NEOX = DATA / "tokenizers" / "gpt_neox_20b" / "20B_tokenizer.json"
END = "<|endoftext|>"
NEW = ["<|im_start|>", "<|im_end|>"]
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "\n  4, naïve 🐈"},
]
FORMATS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": CHAT}, {"messages": CHAT[1:3]}],
    "sharegpt": [
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}.get(one["role"], "system"), "value": one["content"]}
                for one in CHAT
            ]
        },
        {"conversations": [{"from": "human", "value": "a b c"}, {"from": "gpt", "value": "d e f"}]},
    ],
    "alpaca": [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "hi", "output": "hello you"}],
    "prompt_completion": [{"prompt": "1 + 1 =", "completion": " 2"}, {"question": "Who?", "answer": "Me, and you."}],
}


def their_count(tokenizer_file: Path, source: str, chats: list[list[dict[str, str]]], new: list[str]) -> list[Any]:
    """Ids and mask of each conversation, as transformers has them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), bos_token=END, eos_token=END)
    theirs.add_special_tokens({"additional_special_tokens": new})
    return [
        theirs.apply_chat_template(
            chat, chat_template=source, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
        )
        for chat in chats
    ]


def without_marks(source: str) -> str:
    for mark in ("{%- generation %}", "{% endgeneration %}"):
        source = source.replace(mark, "")
    return source


@pytest.mark.skipif(not OASST.is_file(), reason="no ../shared/data beside the repository")
@pytest.mark.parametrize("source", [CHATML, PLAIN, RAW], ids=["chatml", "plain", "raw"])
def test_every_counted_token_of_real_chats_is_one_that_transformers_counts(source: str) -> None:
    chats = [json.loads(line)["messages"] for line in OASST.read_text(encoding="utf-8").splitlines()]
    loaded = with_special_tokens(load_tokenizer(NEOX), NEW)
    encoder = ChatEncoder(loaded)
    expected = their_count(NEOX, source, chats, NEW)
    for spelled in (source, without_marks(source)):
        template = ChatTemplate(spelled, "a test", END, END)
        rendered = [
            render_counted(
                template,
                chat,
                [number for number, one in enumerate(chat) if one["role"] == "assistant"],
                encoder.special_texts,
            )
            for chat in chats
        ]
        ours = encoder.encode([text for text, _ in rendered], [spans for _, spans in rendered])
        assert [chat.ids.tolist() for chat in ours] == [theirs["input_ids"] for theirs in expected]
        assert [chat.counted.astype(int).tolist() for chat in ours] == [
            theirs["assistant_masks"] for theirs in expected
        ]
    assert sum(sum(theirs["assistant_masks"]) for theirs in expected) > 100_000


@pytest.mark.skipif(not OASST.is_file(), reason="no ../shared/data beside the repository")
def test_a_folder_of_real_chats_counts_what_transformers_counts(tmp_path: Path) -> None:
    section = ChatSection(files=[str(OASST)], template="chatml", tokenizer=str(NEOX), new_tokens=NEW, held_out=0.1)
    loaded = chat_tokenizer(section, None)
    corpus = tokenize_chats(section, loaded, find_template("chatml", loaded), 8192, tmp_path / "chats")
    record = corpus.manifest.chats
    assert record is not None
    chats = [json.loads(line)["messages"] for line in OASST.read_text(encoding="utf-8").splitlines()]
    expected = their_count(NEOX, CHATML, chats, NEW)
    assert record.num_truncated == 0
    assert sum(record.num_counted.values()) == sum(sum(theirs["assistant_masks"]) for theirs in expected)
    assert corpus.train.num_tokens + corpus.held_out.num_tokens == sum(len(theirs["input_ids"]) for theirs in expected)
    assert corpus.held_out.num_documents == 42


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    section = ModelSection(d_model=16, num_layers=2, vocab_size=512 + len(NEW), d_state=4)
    model = LanguageModel(section, choose_backend("torch", torch.device("cpu")))
    initialise(model, section, seed=5)
    return model


def rows_of(folder: Path, rows: list[dict[str, Any]], template: str, tokenizer: Path) -> PackedWindows:
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = ChatSection(files=[str(file)], template=template, tokenizer=str(tokenizer), new_tokens=NEW, held_out=0.0)
    loaded = chat_tokenizer(section, None)
    tokenize_chats(section, loaded, find_template(template, loaded), 256, folder / "chats")
    tokens = open_tokens(folder / "chats")
    return open_packing(tokens.train, 256, tokens.digest, may_write=False)


def gradients(model: LanguageModel, batch: MicroBatch, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss; its gradient at what the head reads, (B, L, d_model); and that of each parameter."""
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    hook = model.norm_f.register_forward_hook(keep)
    model.zero_grad(set_to_none=True)
    loss = model.summed_loss(batch.tokens, batch.boundaries, targets)
    loss.backward()
    hook.remove()
    assert kept[0].grad is not None
    return loss.detach(), kept[0].grad, {name: value.grad.clone() for name, value in model.named_parameters()
                                         if value.grad is not None}  # fmt: skip


@pytest.mark.parametrize("template", SHIPPED)
@pytest.mark.parametrize("format", FORMATS)
def test_the_gradient_is_exactly_zero_where_nothing_counts(
    tmp_path: Path, tiny_shards: Path, model: LanguageModel, format: str, template: str
) -> None:
    windows = rows_of(tmp_path, FORMATS[format], template, tiny_shards / "tokenizer.json")
    assert windows.num_windows == 1  # both conversations in one row
    batch = windows.rows(np.arange(1))
    counted = batch.targets != IGNORED_TARGET
    assert int(counted.sum()) == windows.num_targets > 0
    first = int(windows.shard.document_lengths[0])
    assert batch.boundaries[0].nonzero().flatten().tolist() == [0, first - 1]  # its last token is no input
    _, at_head, _ = gradients(model, batch, batch.targets)
    assert (at_head[~counted] == 0).all()
    assert (at_head[counted].abs().sum(dim=-1) > 0).all()
    # What counts is the answers, each with what ends it.
    loaded = load_tokenizer(tmp_path / "chats" / "tokenizer.json", END)
    shard = windows.shard
    assert shard.counted is not None
    end = "<|im_end|>" if template == "chatml" else END
    said = loaded.decode(shard.tokens(0, shard.num_tokens)[shard.counted].tolist())
    answers = {"messages": 3, "sharegpt": 3, "alpaca": 2, "prompt_completion": 2}[format]
    assert said.count(end) == answers == len([one for one in said.split(end) if one])
    assert not any(asked in said for asked in ("What is", "be kind", "Add.", "1 + 1", "a b c", "Who?"))


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_prompts_labels_say_changes_nothing(
    tmp_path: Path, tiny_shards: Path, model: LanguageModel, format: str
) -> None:
    windows = rows_of(tmp_path, FORMATS[format], "chatml", tiny_shards / "tokenizer.json")
    batch = windows.rows(np.arange(1))
    loss, _, before = gradients(model, batch, batch.targets)
    labels = torch.roll(batch.tokens, -1, dims=1)  # every next token, the prompt's too
    counted = batch.targets != IGNORED_TARGET
    assert torch.equal(labels[counted], batch.targets[counted])
    other = torch.where(counted, labels, (labels + 7) % 512)
    again, _, after = gradients(model, batch, other.masked_fill(~counted, IGNORED_TARGET))
    assert torch.equal(loss, again) and all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(gradients(model, batch, other)[0], loss)  # it would, were they trained on
